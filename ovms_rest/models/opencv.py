"""OpenCV, set up for a worker."""

import os

import cv2

__all__ = ["cv2"]

# A worker is one thread on one core, and a fork does not inherit OpenCV's thread pool.
cv2.setNumThreads(1)
# OpenCV would log several lines for every invalid file of a client.
if "OPENCV_LOG_LEVEL" not in os.environ:
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
