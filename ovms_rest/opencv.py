"""OpenCV as this service uses it; everything here takes `cv2` from this module."""

import os

# It would write several lines for every broken file of a client.
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")

import cv2

__all__ = ["cv2"]

# A worker is one thread on one core, and a fork does not inherit a pool of others.
cv2.setNumThreads(1)
