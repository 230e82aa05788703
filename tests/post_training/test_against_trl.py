"""DPO and the reward model against TRL: the same weights, ids and masks give the same loss and gradients, tensor by tensor."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from herd_jax.data.packing import join
from herd_jax.data.preferences import Preference, Response, preference_example
from herd_jax.model import Model
from herd_jax.models.config import LlamaConfig
from herd_jax.post_training.config import PreferenceLoss
from herd_jax.post_training.dpo import dpo_task
from herd_jax.post_training.reward import reward_task

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

CONFIG = LlamaConfig(32, 2, 4, 2, 8, 48, vocab_size=40, rope_theta=1e4, init_std=0.2)
STOP, PAD = 2, 3
PAIRS = [([5, 6, 10], [7, 0, 8, STOP], [9, STOP]), ([4], [11, STOP], [12, 13, 14, STOP]), ([4, 9], [0, 0, STOP], [15, STOP])]
NAMES = {"sigmoid": "sigmoid", "ipo": "ipo"}


def preferences():
    full = lambda ids, rank: Response(ids, [True] * len(ids), rank)
    return [Preference(prompt, (full(chosen, 2), full(rejected, 1))) for prompt, chosen, rejected in PAIRS]


def save(steps, params, path):
    Model.of(steps.model, steps.layout, params, None, 64, jnp.float32).save(path, "huggingface")
    return path


def trl_tokenizer():
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(CONFIG.vocab_size)}, "w1"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own, eos_token=f"w{STOP}", pad_token=f"w{PAD}", unk_token="w1")


def gradients_of(path):
    return {name: array for file in path.glob("*.safetensors") for name, array in safetensors_numpy.load_file(file).items()}


def compare(steps, rows, loss, model, tmp_path):
    """Our loss and gradient, the latter written as a model, against TRL's loss and `model`'s gradients."""
    batch = tiny.to_batch(steps, {name: rows[name] for name in steps.task.fields}, 1)
    ours, gradient = steps.gradient(steps.plan.init(0).params, batch)
    assert float(ours) == pytest.approx(loss, rel=1e-5)
    for name, array in gradients_of(save(steps, gradient, tmp_path / "gradient")).items():
        theirs = dict(model.named_parameters())[name].grad
        theirs = np.zeros_like(array) if theirs is None else theirs.numpy()
        assert np.abs(array - theirs).max() <= 1e-4 * max(np.abs(theirs).max(), 1e-6), name


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("options", [{}, {"masks_format": True}, {"beta": 0.4, "nll": 0.0}, {"kind": "ipo", "nll": 0.0}], ids=str)
def test_dpo(tmp_path, options, share_prompt):
    loss = PreferenceLoss(**{"masks_format": False, **options})
    steps = tiny.make_steps(config=CONFIG, task=dpo_task(loss, 8))
    policy, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(save(steps, steps.plan.init(seed).params, tmp_path / str(seed))) for seed in (0, 1)
    )
    ours = Model.of(steps.model, steps.layout, steps.plan.init(1).params, None, 64, jnp.float32)
    rows = []
    for preference in preferences():
        example = preference_example(preference, (0, 1), share_prompt, (STOP,) if loss.masks_format else ())
        example["reference"] = np.zeros(len(example["tokens"]), np.float32)
        for number, response in enumerate(preference.responses, 1):
            last = np.flatnonzero(example["response_ids"] == number)[-1]
            example["reference"][last - len(response.ids) : last] = ours.log_probabilities([preference.prompt], [response.ids])[0]
        rows.append(example)
    row = join(rows, 64)

    data = datasets.Dataset.from_dict({"prompt": ["w5 w6"], "chosen": [" w7 w8"], "rejected": [" w9"]})
    kinds = [NAMES[loss.kind], *(["sft"] if loss.nll else [])]
    examples = [{"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected} for prompt, chosen, rejected in PAIRS]
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    batch = DataCollatorForPreference(pad_token_id=PAD)(examples)
    without_format = batch | {"completion_mask": batch["completion_mask"] * (batch["input_ids"] != STOP)}

    def theirs(batch, kinds, weights):
        settings = trl.DPOConfig(
            output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, report_to=[], beta=loss.beta,
            loss_type=kinds, loss_weights=weights,
        )  # fmt: skip
        trainer = trl.DPOTrainer(model=policy, ref_model=reference, args=settings, processing_class=trl_tokenizer(), train_dataset=data)
        policy.train(False)
        found = trainer._compute_loss(trainer.model, {name: value.clone() for name, value in batch.items()}, False)
        found.backward()
        return float(found)

    policy.zero_grad()
    if loss.masks_format:  # TRL has one mask for both terms
        total = theirs(without_format, ["sigmoid"], [1.0]) + theirs(batch, ["sft"], [loss.nll])
    else:
        total = theirs(batch, kinds, [1.0, loss.nll][: len(kinds)])
    compare(steps, {name: value[None] for name, value in row.items()}, total, policy, tmp_path)


@pytest.mark.parametrize("share_prompt", [True, False])
def test_the_reward_model(tmp_path, share_prompt):
    steps = tiny.make_steps(config=dataclasses.replace(CONFIG, reward=True), task=reward_task(8))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(save(steps, steps.plan.init(0).params, tmp_path / "model"))
    model.config.pad_token_id = PAD
    from trl.trainer.reward_trainer import DataCollatorForPreference

    batch = DataCollatorForPreference(pad_token_id=PAD)([{"chosen_ids": [*p, *c], "rejected_ids": [*p, *r]} for p, c, r in PAIRS])
    data = datasets.Dataset.from_dict({"chosen": ["w5 w7 w8"], "rejected": ["w5 w9"]})
    settings = trl.RewardConfig(output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, report_to=[])
    trainer = trl.RewardTrainer(model=model, args=settings, processing_class=trl_tokenizer(), train_dataset=data)
    model.train(False)
    model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    row = join([preference_example(preference, (1, 0), share_prompt, ()) for preference in preferences()], 64)
    compare(steps, {name: value[None] for name, value in row.items()}, float(loss), model, tmp_path)
