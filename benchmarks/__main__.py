"""Entry of `python -m benchmarks`; see command.py."""

if __name__ == "__main__":
    from benchmarks.command import main  # not above: the processes of other runtimes import this file, too

    main()
