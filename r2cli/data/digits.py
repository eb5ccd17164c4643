"""scikit-learn's digits: 1,797 real 8x8 scans (UCI ML hand-written digits, test part), embedded, so always there."""

import torch

from r2cli.data.request import Data, Request, in_memory

TEST = 597  # scans that are held out, stratified
SIZE = 16  # pixels; at the scans' own 8x8 a MobileNet has nothing left after its strides
MEAN, STD = (0.3053,), (0.3763,)  # of the 8x8 training scans


def load(request: Request) -> Data:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)  # (1797, 64) of 0 .. 16
    spec = request.input(1, SIZE, mean=MEAN, std=STD)
    scans = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) * (255 / 16)
    if spec.size != 8:
        scans = torch.nn.functional.interpolate(scans, (spec.size, spec.size), mode="bilinear")
    images = scans.round().to(torch.uint8)
    target = torch.from_numpy(labels).long()
    halves = train_test_split(torch.arange(len(target)), test_size=TEST, stratify=labels, random_state=0)
    train, test = ((images[index], target[index]) for index in halves)
    return in_memory("digits", [str(digit) for digit in range(10)], spec, train=train, test=test, augments=False)
