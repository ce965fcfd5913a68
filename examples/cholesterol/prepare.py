"""Write the lipid panel of 442 patients (Efron et al., 2004; in scikit-learn) as tables of three hospitals.

The hospitals are made up, and differ on purpose: `east` is a clinic for young people and has the 88
youngest patients, `south` the 133 heaviest of the others, `north` the remaining 221.
"""

from pathlib import Path

import pandas as pd
from sklearn.datasets import load_diabetes

COLUMNS = ["age", "sex", "bmi", "bp", "tc", "ldl", "hdl", "tch", "ltg", "glu"]
"""scikit-learn calls the last six s1 to s6; `ltg` is the logarithm of the triglycerides."""


def main() -> None:
    """Write north.csv, south.csv and east.csv into this folder."""
    panel = pd.DataFrame(load_diabetes(scaled=False).data, columns=COLUMNS)
    by_age = panel.sort_values("age", kind="stable")
    east, others = by_age[:88], by_age[88:]
    by_weight = others.sort_values("bmi", ascending=False, kind="stable")
    south, north = by_weight[:133], by_weight[133:]
    folder = Path(__file__).parent
    for name, table in (("north", north), ("south", south), ("east", east)):
        table.sort_index().to_csv(folder / f"{name}.csv", index=False)


if __name__ == "__main__":
    main()
