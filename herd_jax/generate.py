"""`python -m herd_jax.generate --model WORKDIR --prompt TEXT`: a continuation by the newest checkpoint of a training run."""

import argparse

from herd_jax.errors import command_line
from herd_jax.training.sampling import sample


@command_line
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m herd_jax.generate", description=__doc__)
    parser.add_argument("--model", required=True, help="workdir of a training run")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    print(args.prompt + sample(args.model, args.prompt, args.max_new_tokens, args.temperature, args.seed))


if __name__ == "__main__":
    main()
