"""Published weights of the feature networks that `admfast fetch` downloads by name."""

from admfast.evaluation.inception_weights import FILES
from admfast.evaluation.networks import DINO_FOLDER
from admfast.files.download import RemoteFile

_INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
# The revision, not "main": these hashes belong to it.
_DINO_URL = "https://huggingface.co/facebook/dinov2-large/resolve/47b73eefe95e8d44ec3623f8890bd894b6ea2d6c/"

# The files by name of the network and by path in the folder of weights. Sizes and hashes: public records of
# several downloaders agree. Inception's hash also begins with the digits in the name of its file; the bytes
# of DINOv2's weights are those of its 439 tensors in float32 and a header with their names; the hash of its
# config.json is that of the configuration as transformers writes it.
PUBLISHED_WEIGHTS = {
    "inception": {
        FILES[0]: RemoteFile(
            _INCEPTION_URL + FILES[0],
            95_628_359,
            "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        ),
    },
    "dinov2": {
        f"{DINO_FOLDER}/config.json": RemoteFile(
            _DINO_URL + "config.json",
            549,
            "12df51c069a2dc1305e34ba71ef58bc2407ea553b75f4722a1715c1bce3bbed0",
        ),
        f"{DINO_FOLDER}/model.safetensors": RemoteFile(
            _DINO_URL + "model.safetensors",
            1_217_522_888,
            "399fba97a95f22c36834418bc69373364a99af3a1153da1c0fb31db567c92e23",
        ),
    },
}
