"""`python -m slrc`, for launchers such as `accelerate launch -m slrc`."""

from slrc.cli import main

if __name__ == "__main__":
    main()
