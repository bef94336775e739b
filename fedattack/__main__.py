"""``python -m fedattack``: the command, as installed. Beside the front door the only import of what lies above."""

from simulations.run import main

if __name__ == "__main__":
    main()
