"""Threads of Python that do something at once."""

import threading


def at_once(*functions, timeout=120):
    """Run the functions in threads of their own that begin together. What one of them raises is raised here."""
    begin, errors = threading.Barrier(len(functions)), []

    def run(function):
        begin.wait()
        try:
            function()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]
