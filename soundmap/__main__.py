"""``python -m soundmap`` is the command line."""

from soundmap.cli import main

if __name__ == "__main__":
    main()
