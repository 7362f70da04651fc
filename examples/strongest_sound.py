"""Map a few sounds of the sample scene and say how much of it each of them leads.

python examples/strongest_sound.py
"""

from __future__ import annotations

import soundmap

SOUNDS = ["birdsong", "ocean waves", "motorway roar", "voices in the street", "tractor at work"]


def main() -> None:
    sounds = soundmap.predict("sample", concepts=SOUNDS, text=["church bells"])
    strongest = sounds.idxmax("concept")
    for name in sounds.concept.values:
        share = float((strongest == name).mean())
        peak = float(sounds.sel(concept=name).max())
        print(f"{name:22s} leads in {share:5.1%} of the scene, at most {peak:.2f}")


if __name__ == "__main__":
    main()
