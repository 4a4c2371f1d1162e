"""Entry of `python -m benchmarks.runtimes`; see command.py."""

if __name__ == "__main__":
    from benchmarks.runtimes.command import main  # not above: the processes of the contenders import this file too

    main()
