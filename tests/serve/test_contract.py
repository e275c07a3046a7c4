"""Frames are chosen of files that hold several, and nothing that a request says is passed over in silence."""

import hostile
import numpy as np
import pytest

from raymed.serve.contract import check_frames
from raymed.serve.handlers import Upload
from raymed.serve.problems import Problem

PIXELS = np.zeros((2, 2), np.uint8)
STILL, RUN = Upload(PIXELS), [Upload(PIXELS, 1, frame) for frame in (1, 2)]


@pytest.mark.parametrize(("frames", "uploads"), [(None, [STILL]), (None, []), ([1, 2], RUN), ([1, 2], [STILL, *RUN])])
def test_frames_of_what_holds_several(frames, uploads):
    check_frames(frames, uploads)


@pytest.mark.parametrize("uploads", [[], [STILL], [STILL, STILL]])
def test_frames_of_what_holds_one_are_refused(uploads):
    with pytest.raises(Problem, match="^frames: ") as raised:
        check_frames([1], uploads)
    assert (raised.value.status, raised.value.field) == (422, "frames")


def test_a_request_that_chooses_frames_of_a_picture_is_told(client, png):
    def asked(content, **fields):
        return client.post("/v1/models/hsg:predict", files=[("file", content)], data=fields)

    run = hostile.dicom(np.stack([hostile.GREY, hostile.GREY[::-1]]), BodyPartExamined="UTERUS", NumberOfFrames=2)
    for content in (png, hostile.dicom(BodyPartExamined="UTERUS")):
        answer = asked(content, frames=1)
        assert answer.status_code == 422 and answer.json()["field"] == "frames"
        assert asked(content).status_code == 200
    assert [image["frame"] for image in asked(run, frames=2).json()["result"]["images"]] == [2]
    pixels = {"name": "image", "datatype": "UINT8", "shape": [1, 2, 2], "data": [1, 2, 3, 4]}
    answer = client.post("/v2/models/hsg/infer", json={"inputs": [pixels], "parameters": {"frames": 1}})
    assert answer.status_code == 422 and answer.json()["error"].startswith("frames: ")
