"""Writes a tokenizer.json for a folder that has none, in a process of its own; it does not know who reads it.

python -m backend.compute.convert_tokenizer FOLDER FILE     transformers' tokenizer of FOLDER, as `tokenizers` reads it
"""

from __future__ import annotations

import sys

import tokenizers
from transformers import AutoTokenizer


def main() -> None:
    """One line on standard error, and exit status 1, where there is no such tokenizer."""
    folder, file = sys.argv[1:]
    try:
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many kinds
        sys.exit((str(error).strip().splitlines() or [type(error).__name__])[0])
    if not isinstance(rust := getattr(found, "backend_tokenizer", None), tokenizers.Tokenizer):
        sys.exit(f"{type(found).__name__} has no fast form: add a tokenizer.json")
    rust.save(file)


if __name__ == "__main__":
    main()
