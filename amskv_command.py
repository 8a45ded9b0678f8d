"""The `amskv` command from its first import on, which takes seconds: an interrupt is quiet then, too.

It stands outside the package because importing anything inside imports torch first.
"""


def main() -> int:
    """Run `amskv_kernels.cli.main`; 130 where the user interrupts before it has begun."""
    try:
        from amskv_kernels.cli import main as command
    except KeyboardInterrupt:
        return 130
    return command()
