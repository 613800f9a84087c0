"""OpenCV, set up for a worker."""

import os

import cv2

__all__ = ["cv2"]

# A worker is one thread on one core, and a fork does not inherit a pool of others.
cv2.setNumThreads(1)
# It would write several lines for every broken file of a client.
if "OPENCV_LOG_LEVEL" not in os.environ:
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
