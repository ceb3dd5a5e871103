"""The entry of the command line. What takes time to import is imported inside `main`, where Ctrl-C is heard."""

import os
import sys


def main(arguments: list[str] | None = None) -> None:
    """Run a command.

    Exit codes: 0 done, 1 a check failed, 2 wrong use, 130 interrupted, 143 a training or tracing that SIGTERM ended.
    """
    if (sys.argv[1:] if arguments is None else arguments) == ["--version"]:
        import circuitsae

        print(f"circuitsae {circuitsae.__version__}")
        return
    # Threads that spin while they wait make torch several times slower on a busy machine; read when torch starts.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        from circuitsae.commands.app import run

        run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        sys.exit(getattr(stop, "exit_code", 130))
    except BrokenPipeError:  # whoever read the output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
