"""BibTeX for a card's last section: the paper of the method, by its address, and hf_fusion.

A paper with more than three authors has the first and "others", as BibTeX abbreviates them.
"""

from __future__ import annotations

from typing import NamedTuple


class Paper(NamedTuple):
    """What BibTeX says of a paper, beside its address."""

    key: str
    title: str
    author: str
    year: int
    venue: str = ""


PAPERS = {
    # ------------------------------------------------------------ families
    "https://arxiv.org/abs/2310.01542": Paper(
        "wang2024fusing", "Fusing Models with Complementary Expertise", "Wang, Hongyi and others", 2024, "ICLR"
    ),
    "https://arxiv.org/abs/2402.05859": Paper(
        "muqeeth2024phatgoose",
        "Learning to Route Among Specialized Experts for Zero-Shot Generalization",
        "Muqeeth, Mohammed and others",
        2024,
        "ICML",
    ),
    "https://arxiv.org/abs/2405.11157": Paper(
        "ostapenko2024arrow",
        "Towards Modular LLMs by Building and Reusing a Library of LoRAs",
        "Ostapenko, Oleksiy and others",
        2024,
        "ICML",
    ),
    "https://arxiv.org/abs/2402.00433": Paper(
        "tang2024wemoe",
        "Merging Multi-Task Models via Weight-Ensembling Mixture of Experts",
        "Tang, Anke and others",
        2024,
        "ICML",
    ),
    "https://arxiv.org/abs/2408.10174": Paper(
        "tang2024smile",
        "{SMILE}: Zero-Shot Sparse Mixture of Low-Rank Experts Construction From Pre-Trained Foundation Models",
        "Tang, Anke and others",
        2024,
    ),
    "https://arxiv.org/abs/2406.03280": Paper(
        "tang2024fusionbench",
        "{FusionBench}: A Comprehensive Benchmark of Deep Model Fusion",
        "Tang, Anke and others",
        2024,
    ),
    # ------------------------------------------------------------ static merges
    "https://arxiv.org/abs/2203.05482": Paper(
        "wortsman2022soups",
        "Model Soups: Averaging Weights of Multiple Fine-Tuned Models Improves Accuracy "
        "Without Increasing Inference Time",
        "Wortsman, Mitchell and others",
        2022,
        "ICML",
    ),
    "https://arxiv.org/abs/2212.04089": Paper(
        "ilharco2023arithmetic", "Editing Models with Task Arithmetic", "Ilharco, Gabriel and others", 2023, "ICLR"
    ),
    "https://arxiv.org/abs/2404.16792": Paper(
        "zheng2025expo", "Model Extrapolation Expedites Alignment", "Zheng, Chujie and others", 2025, "ACL"
    ),
    "https://arxiv.org/abs/2405.17461": Paper(
        "huang2024emr", "{EMR}-Merging: Tuning-Free High-Performance Model Merging", "Huang, Chenyu and others", 2024
    ),
    "https://arxiv.org/abs/2111.09832": Paper(
        "matena2022fisher",
        "Merging Models with {Fisher}-Weighted Averaging",
        "Matena, Michael S. and Raffel, Colin",
        2022,
        "NeurIPS",
    ),
    "https://arxiv.org/abs/2212.09849": Paper(
        "jin2023regmean",
        "Dataless Knowledge Fusion by Merging Weights of Language Models",
        "Jin, Xisen and others",
        2023,
        "ICLR",
    ),
    "https://arxiv.org/abs/2403.19522": Paper(
        "jang2024stock",
        "Model Stock: All We Need Is Just a Few Fine-Tuned Models",
        "Jang, Dong-Hwan and Yun, Sangdoo and Han, Dongyoon",
        2024,
        "ECCV",
    ),
    "https://arxiv.org/abs/2212.05055": Paper(
        "komatsuzaki2023upcycling",
        "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints",
        "Komatsuzaki, Aran and others",
        2023,
        "ICLR",
    ),
    "https://arxiv.org/abs/2312.15166": Paper(
        "kim2023solar",
        "{SOLAR} 10.7B: Scaling Large Language Models with Simple yet Effective Depth Up-Scaling",
        "Kim, Dahyun and others",
        2023,
    ),
    "https://arxiv.org/abs/2306.01708": Paper(
        "yadav2023ties",
        "{TIES}-Merging: Resolving Interference When Merging Models",
        "Yadav, Prateek and others",
        2023,
        "NeurIPS",
    ),
    "https://arxiv.org/abs/2311.03099": Paper(
        "yu2024dare",
        "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
        "Yu, Le and others",
        2024,
        "ICML",
    ),
    "https://arxiv.org/abs/2406.11617": Paper(
        "deep2024della",
        "{DELLA}-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
        "Deep, Pala Tej and Bhardwaj, Rishabh and Poria, Soujanya",
        2024,
    ),
    "https://arxiv.org/abs/2312.06795": Paper(
        "davari2024breadcrumbs",
        "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
        "Davari, MohammadReza and Belilovsky, Eugene",
        2024,
        "ECCV",
    ),
    "https://arxiv.org/abs/2408.07990": Paper(
        "wan2024fusechat", "{FuseChat}: Knowledge Fusion of Chat Models", "Wan, Fanqi and others", 2024
    ),
    "https://arxiv.org/abs/2412.00081": Paper(
        "gargiulo2025tsv",
        "Task Singular Vectors: Reducing Task Interference in Model Merging",
        "Gargiulo, Antonio Andrea and others",
        2025,
        "CVPR",
    ),
    "https://arxiv.org/abs/2502.04959": Paper(
        "marczak2025iso",
        "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
        "Marczak, Daniel and others",
        2025,
        "ICML",
    ),
    "https://arxiv.org/abs/2503.08099": Paper(
        "cheng2025wudi",
        "Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task Vectors",
        "Cheng, Runxi and others",
        2025,
        "ICML",
    ),
    "https://doi.org/10.1145/325165.325242": Paper(
        "shoemake1985slerp", "Animating Rotation with Quaternion Curves", "Shoemake, Ken", 1985, "SIGGRAPH"
    ),
    "https://doi.org/10.1002/cpa.3160300502": Paper(
        "karcher1977center",
        "{Riemannian} Center of Mass and Mollifier Smoothing",
        "Karcher, Hermann",
        1977,
        "Communications on Pure and Applied Mathematics",
    ),
}
"""Address, as methods name it → the paper."""


def software(version: str = "") -> str:
    """The BibTeX entry of hf_fusion, of a version if it is known."""
    title = "hf_fusion: One Model from Fine-Tuned Models and {LoRA} Adapters of the {Hugging Face} Hub"
    fields = {"title": title, "author": "{The hf_fusion contributors}", "version": version, "license": "Apache-2.0"}
    return _entry("software", "hf_fusion", {name: value for name, value in fields.items() if value})


def bibtex(url: str, title: str = "") -> str:
    """The BibTeX entry of a method's paper or page.

    Args:
        url: as the method names it; "" for a method without a paper.
        title: of the method, for an address that is not in `PAPERS`.

    Returns:
        The entry; empty where there is no address.
    """
    if not url:
        return ""
    paper = PAPERS.get(url)
    if paper is None:
        key = "".join(filter(str.isalnum, title.lower())) or "method"
        return _entry("misc", key, {"title": title, "url": url})
    kind, place = ("inproceedings", "booktitle") if paper.venue else ("misc", "howpublished")
    if paper.venue.startswith("Communications"):
        kind, place = "article", "journal"
    venue = paper.venue or f"arXiv:{url.rpartition('/')[2]}"
    fields = {"title": paper.title, "author": paper.author, place: venue, "year": str(paper.year), "url": url}
    return _entry(kind, paper.key, fields)


def _entry(kind: str, key: str, fields: dict[str, str]) -> str:
    width = max(map(len, fields))
    lines = ",\n".join(f"  {name:<{width}} = {{{value}}}" for name, value in fields.items())
    return f"@{kind}{{{key},\n{lines}\n}}"
