"""`python -m endoprint` is the command `endoprint`; `torchrun -m endoprint` runs it in a team."""

from endoprint.cli import main

if __name__ == "__main__":
    main()
