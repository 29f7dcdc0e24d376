"""The numbers of a run, from its manifests alone."""

from collections.abc import Mapping


def summarise(manifests: Mapping[str, Mapping]) -> dict:
    """Return the run's summary from the manifests of steps 1 to 5 (step name -> manifest).

    Keys: miou and miou_real (0..1; the latter None without a real network), ratio, their 95 % intervals, images,
    seconds per step, seed, benchmark, segmenter, hardware.
    """
    scores = manifests["05_evaluation"]["metrics"]
    synthetic, real = scores["synthetic"], scores.get("real")
    machine = manifests["03_synthesis"]["hardware"]
    return {
        "benchmark": synthetic["benchmark"],
        "inference": synthetic["inference"],
        "miou": synthetic["miou"],
        "miou_interval": [synthetic["miou_low"], synthetic["miou_high"]],
        "miou_real": real["miou"] if real else None,
        "miou_real_interval": [real["miou_low"], real["miou_high"]] if real else None,
        "ratio": synthetic["miou"] / real["miou"] if real else None,
        "images": manifests["03_synthesis"]["metrics"]["images"],
        "images_real": manifests["04_robust_training"]["metrics"]["images_real"],
        "validation_images": synthetic["images"],
        "segmenter": manifests["04_robust_training"]["parameters"]["segmenter"],
        "generator": manifests["03_synthesis"]["parameters"]["generator"],
        "seed": manifests["04_robust_training"]["parameters"]["seed"],
        "seconds": {name: manifest["seconds"] for name, manifest in manifests.items()},
        "hardware": ", ".join(machine["gpus"]) or f"{machine['cores']} cores of {machine['cpu']}",
    }


def table_text(summary: Mapping) -> str:
    """Return the run's table as plain text, one row a network."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    def row(training: str, images: object, miou: float, interval: tuple[float, float]) -> str:
        bounds = f"{percent(interval[0])} to {percent(interval[1])}"
        return f"{training:<42}{images!s:>8}{percent(miou):>10}   {bounds}"

    lines = [
        f"{summary['benchmark']}, {summary['validation_images']} validation pictures, {summary['segmenter']}, "
        f"seed {summary['seed']}, {summary['inference']}",
        f"{'trained on':<42}{'images':>8}{'mIoU (%)':>10}   95 % interval over pictures",
        row(
            "synthetic pictures, masks from attention",
            summary["images"],
            summary["miou"],
            summary["miou_interval"],
        ),
    ]
    if summary["miou_real"] is not None:
        interval = summary["miou_real_interval"]
        lines.append(row("real pictures, true masks", summary["images_real"], summary["miou_real"], interval))
        lines.append(f"{'ratio':<50}{summary['ratio']:>10.2f}")
    return "\n".join(lines) + "\n"
