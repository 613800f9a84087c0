// A picture from the camera, which is asked for only when the user clicks.

import { make } from "./dom.js";
import { makeButton } from "./elements.js";
import { resize, saveCanvas } from "./pictures.js";

const FAILURES = {
  NotAllowedError: "the camera was not allowed",
  NotFoundError: "no camera was found",
  NotReadableError: "the camera is in use by another program",
};

/**
 * Return {open, live, stop()}: a button, and the element that it shows.
 *
 * `ontake` gets the file of a picture, `onfail` a message.
 */
export function makeCamera({ ontake, onfail }) {
  const video = make("video", { class: "try-video", playsinline: true, "aria-label": "Picture of the camera" });
  video.muted = true;
  let stream = null;

  const stop = () => {
    for (const track of stream?.getTracks() ?? []) track.stop();
    stream = null;
    live.hidden = true;
    open.hidden = false;
  };
  const start = async () => {
    if (!navigator.mediaDevices?.getUserMedia) {
      onfail("the browser gives the camera to pages on https:// and on localhost only");
      return;
    }
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    } catch (error) {
      onfail(FAILURES[error.name] ?? `the camera cannot be used: ${error.message}`);
      return;
    }
    if (!live.isConnected) {
      stop(); // the page has moved on while the user was asked
      return;
    }
    video.srcObject = stream;
    live.hidden = false;
    open.hidden = true;
    take.focus();
    await video.play();
  };
  const shoot = async () => {
    const canvas = resize(video, video.videoWidth, video.videoHeight);
    stop();
    ontake(await saveCanvas(canvas, "camera.jpg", "image/jpeg"));
  };

  const open = makeButton("Camera", start);
  const take = makeButton("Take the picture", shoot);
  const live = make(
    "div",
    { class: "try-camera", hidden: true },
    video,
    make("div", { class: "try-row" }, take, makeButton("Close", stop)),
  );
  return { open, live, stop };
}
