"""What a step minimises: functions from the last hidden state to a scalar and the sums that are logged (`herd_jax.training.task.Objective`).

Responses are named by the field `response_ids`: 0 is no response's token, and 1, 2, ... are the responses of a row. A row has whole responses, so
that the losses of pairs need nothing of other rows.
"""

import jax
import jax.numpy as jnp

from herd_jax.errors import UserError
from herd_jax.models.cross_entropy import cross_entropy_sum
from herd_jax.models.log_probabilities import log_probabilities
from herd_jax.models.reward import rewards
from herd_jax.parallel import collectives, context
from herd_jax.training.task import Fields, Sums

DPO_KINDS = ("sigmoid", "ipo")
CLOSE = 1e-5  # a margin of less is none: reference and policy, computed by two programs, differ by their last digits


def next_token(vocab_size: int, weights: Sums):
    """Returns the objective of pre-training: the sum of masked token losses times the weight of "targets"; what is logged is unweighted, in nats."""

    def objective(hidden_BTD: jax.Array, output_DV: jax.Array, fields: Fields):
        loss = cross_entropy_sum(hidden_BTD, output_DV, fields["targets"], fields["loss_mask"], vocab_size)
        return loss * weights["targets"], {"loss": loss}

    return objective


def dpo_loss(
    policy_chosen_B: jax.Array, policy_rejected_B: jax.Array, reference_chosen_B: jax.Array, reference_rejected_B: jax.Array,
    beta: float = 0.1, label_smoothing: float = 0.0, kind: str = "sigmoid",
) -> jax.Array:  # fmt: skip
    """Returns the loss of each pair, [B], from the log-probabilities of its responses (in nats; sums over tokens, or means where losses shall not
    depend on lengths).

    "sigmoid" is DPO (Rafailov et al. 2023; section 4.1.4 of the paper), `label_smoothing` the share of pairs whose order is taken to be wrong; "ipo"
    is the squared distance of the margin from 1 / (2 beta) (Azar et al. 2023). Raises UserError for another kind, and settings that mean nothing.
    """
    if kind not in DPO_KINDS:
        raise UserError(f"the kind of DPO is '{kind}': it must be one of {', '.join(DPO_KINDS)}")
    if not beta > 0 or not 0 <= label_smoothing < 0.5 or (kind == "ipo" and label_smoothing):
        raise UserError(f"DPO has beta {beta} and label_smoothing {label_smoothing}: beta is more than 0, smoothing from 0 to less than 0.5, and 0 with ipo")
    margin_B = (policy_chosen_B - reference_chosen_B) - (policy_rejected_B - reference_rejected_B)
    if kind == "ipo":
        return (margin_B - 1 / (2 * beta)) ** 2
    right_B, wrong_B = jax.nn.log_sigmoid(beta * margin_B), jax.nn.log_sigmoid(-beta * margin_B)
    return -(1 - label_smoothing) * right_B - label_smoothing * wrong_B


def preference(beta: float, label_smoothing: float, kind: str, by_length: bool, nll: float, most_responses: int):
    """Returns the objective of DPO with a share `nll` of the cross-entropy of the chosen responses.

    Fields: `response_ids` (2 i + 1 is the chosen response of the row's pair i, 2 i + 2 the rejected one), `scored` (the tokens whose log-probabilities
    count in the preference), `loss_mask` (those of the chosen responses that count in the cross-entropy), `reference` (log-probabilities of the
    targets). Counts: "pairs" with a scored token in both responses, "targets" of the cross-entropy. A pair without them has no loss.
    """

    def make(vocab_size: int, weights: Sums):
        def objective(hidden_BTD: jax.Array, output_DV: jax.Array, fields: Fields):
            log_p_BT = log_probabilities(hidden_BTD, output_DV, fields["targets"], vocab_size)
            of_BTR = _of_responses(fields["response_ids"], most_responses) & fields["scored"][..., None]
            total = lambda value_BT: context.sum_over_rows(jnp.where(of_BTR, value_BT[..., None], 0))
            number_BR = total(jnp.ones_like(log_p_BT))
            scale_BR = 1 / jnp.maximum(number_BR, 1) if by_length or kind == "ipo" else 1.0
            policy_BR, reference_BR = total(log_p_BT) * scale_BR, total(fields["reference"]) * scale_BR
            chosen, rejected = (slice(None), slice(0, None, 2)), (slice(None), slice(1, None, 2))
            counts_BP = (number_BR[chosen] > 0) & (number_BR[rejected] > 0)
            share = 1 / collectives.axis_size("cp")  # each cp rank knows the whole row
            over_pairs = lambda value_BP: jnp.where(counts_BP, value_BP, 0).sum() * share
            pair = policy_BR[chosen], policy_BR[rejected], reference_BR[chosen], reference_BR[rejected]
            loss = over_pairs(dpo_loss(*pair, beta, label_smoothing, kind))
            reward_BR = beta * (policy_BR - reference_BR)
            margin_BP = reward_BR[chosen] - reward_BR[rejected]
            likely = -jnp.where(fields["loss_mask"], log_p_BT, 0).sum()
            found = {
                "reward_chosen": reward_BR[chosen], "reward_rejected": reward_BR[rejected], "margin": margin_BP, "accuracy": margin_BP > beta * CLOSE,
                "log_p_chosen": policy_BR[chosen], "log_p_rejected": policy_BR[rejected],
            }  # fmt: skip
            sums = {name: over_pairs(value_BP.astype(jnp.float32)) for name, value_BP in found.items()}
            return loss * weights["pairs"] + nll * likely * weights["targets"], {"preference_loss": loss, "nll": likely, **sums}

        return objective

    return make


def count_preferences(fields: Fields, most_responses: int) -> Sums:
    """Returns the counts of `preference`, of micro-batches [M, B, T]."""
    of_MBTR = _of_responses(fields["response_ids"], most_responses) & fields["scored"][..., None]
    has_MBR = collectives.all_reduce(of_MBTR.sum(2), "cp") > 0
    pairs = (has_MBR[..., 0::2] & has_MBR[..., 1::2]).sum(dtype=jnp.float32) / collectives.axis_size("cp")
    return {"pairs": pairs, "targets": fields["loss_mask"].sum(dtype=jnp.float32)}


def preference_means(nll: float):
    """Returns the `means` of a task with the objective `preference`."""

    def means(sums: Sums, counts: Sums) -> dict[str, jax.Array]:
        found = {name: total / counts["targets" if name == "nll" else "pairs"] for name, total in sums.items()}
        return {"loss": found["preference_loss"] + nll * found["nll"], **found}

    return means


def ranking(most_responses: int):
    """Returns the objective of a reward model: for each two responses to a prompt, -log sigmoid(reward of the better less that of the other)
    (Bradley-Terry, without Llama 2's margin; section 4.1.2 of the paper).

    Fields: `response_ids`; `levels`, at the token of each response where its reward is read: 1, 2, ..., more is better, and 0 at all others;
    `prompt_ids`: responses of the same are compared. Counts: "pairs", of unequal levels.
    """

    def make(vocab_size: int, weights: Sums):
        def objective(hidden_BTD: jax.Array, reward_D: jax.Array, fields: Fields):
            reward_BT = rewards(hidden_BTD, reward_D)
            reward_BR, better_BRR = _compared(fields, most_responses, reward_BT)
            margin_BRR = reward_BR[:, :, None] - reward_BR[:, None, :]
            share = 1 / collectives.axis_size("cp")
            over_pairs = lambda value_BRR: jnp.where(better_BRR, value_BRR, 0).sum(dtype=jnp.float32) * share
            loss = over_pairs(-jax.nn.log_sigmoid(margin_BRR))
            right = over_pairs(jnp.where(margin_BRR > 0, 1.0, jnp.where(margin_BRR < 0, 0.0, 0.5)))
            return loss * weights["pairs"], {"loss": loss, "accuracy": right, "margin": over_pairs(margin_BRR)}

        return objective

    return make


def count_comparisons(fields: Fields, most_responses: int) -> Sums:
    """Returns the counts of `ranking`, of micro-batches [M, B, T]."""
    flat = {name: fields[name].reshape(-1, fields[name].shape[-1]) for name in ("response_ids", "levels", "prompt_ids")}
    _, better_BRR = _compared(flat, most_responses, jnp.zeros(flat["levels"].shape))
    return {"pairs": better_BRR.sum(dtype=jnp.float32) / collectives.axis_size("cp")}


def _compared(fields: Fields, most_responses: int, reward_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the reward of each response [B, R], and whether the first of two is the better one of the same prompt [B, R, R]."""
    read_BTR = _of_responses(fields["response_ids"], most_responses) & (fields["levels"] > 0)[..., None]
    at_end = lambda value_BT: context.sum_over_rows(jnp.where(read_BTR, value_BT[..., None], 0))
    reward_BR, level_BR, prompt_BR = at_end(reward_BT), at_end(fields["levels"]), at_end(fields["prompt_ids"])
    same_BRR = prompt_BR[:, :, None] == prompt_BR[:, None, :]
    return reward_BR, same_BRR & (level_BR[:, :, None] > level_BR[:, None, :]) & (level_BR[:, None, :] > 0)


def _of_responses(response_ids_BT: jax.Array, most_responses: int) -> jax.Array:
    """Returns which tokens are of which response, bool [..., T, R]."""
    return response_ids_BT[..., None] == 1 + jnp.arange(most_responses)
