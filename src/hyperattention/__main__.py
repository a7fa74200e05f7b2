"""`python -m hyperattention`: the command line."""

from hyperattention.cli.main import app

if __name__ == "__main__":
    app(prog_name="hyperattention")
