"""OpenCV, set up for a worker."""

import os

import numpy as np

from ovms_rest.models.opencv import cv2


def test_opencv_computes_in_the_calling_thread():
    before = len(os.listdir("/proc/self/task"))
    cv2.resize(np.zeros((2000, 2000, 3), np.uint8), (1000, 1000))
    assert cv2.getNumThreads() == 1
    assert len(os.listdir("/proc/self/task")) == before
