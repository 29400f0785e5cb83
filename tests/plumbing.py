"""Copies the plumbing block, whose one text is plumbing.txt, into every script: `python tests/plumbing.py`.

What differs between scripts stands in the block as «name»; its values are here. What a script has below the block,
whose last function is `main`, is its own and stays.
"""

from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN = "# Plumbing: the same in every script."
TABULAR = {
    "checkpoint": "checkpoint.txt",
    "torch": "",
    "write": "file.write((repr(state) if name == CHECKPOINT else json.dumps(state, indent=2)).encode())",
    "read": "ast.literal_eval(Path(folder, CHECKPOINT).read_text())",
    "make": "gym.make(args.env_id, **drawing, **args.env_kwargs)",
}
NEURAL = TABULAR | {
    "checkpoint": "checkpoint.pt",
    "torch": ', "torch"',
    "write": "torch.save(state, file) if name == CHECKPOINT else file.write(json.dumps(state, indent=2).encode())",
    "read": 'torch.load(Path(folder, CHECKPOINT), map_location="cpu", weights_only=True)',
}
ATARI = NEURAL | {"make": "make_wrapped(args, **drawing)"}
SCRIPTS = {
    "dyna_q": TABULAR | {"algorithm": "Dyna-Q"},
    "dyna_q_plus": TABULAR | {"algorithm": "Dyna-Q+"},
    "cem_mpc": NEURAL | {"algorithm": "PETS"},
    "mbpo": NEURAL | {"algorithm": "MBPO"},
    "muzero": ATARI | {"algorithm": "MuZero"},
    "dreamer": ATARI | {"algorithm": "Dreamer"},
    "td_mpc2": NEURAL | {"algorithm": "TD-MPC2"},
}


def block(script: str) -> str:
    """The text of the block as it has to stand in a script."""
    text = (ROOT / "tests" / "plumbing.txt").read_text()
    for name, value in (SCRIPTS[script] | {"script": script}).items():
        text = text.replace(f"«{name}»", value)
    return text


def split(text: str) -> tuple[str, str, str]:
    """A script as what is above its block, the block, and what is below it."""
    first = text.index(BEGIN)
    first = text.rindex("\n# ---", 0, first) + 1
    end = text.index("        raise\n", text.index("\ndef main()", first)) + len("        raise\n")
    return text[:first], text[first:end], text[end:]


if __name__ == "__main__":
    for name in SCRIPTS:
        path = ROOT / f"{name}.py"
        text = path.read_text()
        if BEGIN in text:
            above, _, below = split(text)
            path.write_text(above + block(name) + below)
