"""Entry point of ``python -m vlduet``, such as ``torchrun -m vlduet train``."""

from vlduet.cli.main import main

if __name__ == "__main__":
    main()
