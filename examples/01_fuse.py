"""Eight experts that each know a part of the digits become one model that knows them all. Takes half a minute.

    python examples/01_fuse.py

It writes the folder fused/ and the picture accuracy-cost.png, and prints predictor, accuracy, 95 % interval and cost:

    FoE                       98.0%   97.2% – 98.6%  100%
    FoE, frugal               98.1%   97.3% – 98.6%   29%
    convnextv2-digits-even    47.8%   45.4% – 50.3%   19%
    mobilenet-digits-odd      51.1%   48.6% – 53.5%   19%
    pvt-scans-high            22.6%   20.6% – 24.7%   18%
    regnet-digits-lookalikes  48.0%   45.5% – 50.4%    5%
    resnet-mnist-high         48.5%   46.0% – 50.9%   16%
    swin-scans-low            31.4%   29.2% – 33.8%    9%
    vit-mnist-low             42.8%   40.4% – 45.3%   12%
    vit-tiny-digits           76.8%   74.7% – 78.8%    2%
    mean ensemble             93.0%   91.7% – 94.2%  100%
    max confidence            90.7%   89.1% – 92.0%  100%
    oracle expert            100.0%  99.8% – 100.0%  100%
"""

from hf_fusion import evaluate, fit_fuser, fuse
from hf_fusion.demo.digits import DIGITS, EXPERTS, LABEL_MAPS, digit_expert, digits
from hf_fusion.evaluation.plots import plot_accuracy_cost

rows = digits()  # real handwritten digits, from PyPI
model = fuse("foe", map(digit_expert, EXPERTS), labels=DIGITS, label_maps=LABEL_MAPS)  # ids on the Hub work as well
fit_fuser(model, rows["fit"], frugal=True)  # learn which expert to trust on which digit, and which to skip
results = evaluate(model, rows["test"])
plot_accuracy_cost(results, "accuracy-cost.png")
model.save_pretrained("fused")  # AutoModel.from_pretrained("fused", trust_remote_code=True) loads it anywhere

for row in results.table():
    print(f"{row['predictor']:24} {row['accuracy']:>6}  {row['95 % interval']:>14}  {row['cost']}")
