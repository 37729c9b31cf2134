"""`python -m sae_train`: the same entry as `sae-train`, for torchrun, accelerate launch and srun."""

from sae_train.cli.train import main

if __name__ == "__main__":
    main()
