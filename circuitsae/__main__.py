"""`python -m circuitsae`, which is also how torchrun starts it."""

from circuitsae.cli import main

if __name__ == "__main__":
    main()
