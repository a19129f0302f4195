"""`python -m icae`: the command line, for launchers that run modules (`torchrun -m icae finetune ...`)."""

from icae.cli import main

main()
