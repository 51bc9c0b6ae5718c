"""``python -m bitquota`` is the command line."""

from bitquota.cli import main

if __name__ == "__main__":
    main()
