"use strict";
// Each figure holds every picture of its pair; the controls above say which two of them are seen, and where they meet.
for (const viewer of document.querySelectorAll(".viewer")) {
  const step = viewer.querySelector("[data-control=step]"), left = viewer.querySelector("[data-control=left]");
  const show = () => {
    const steps = step.dataset.steps.split(","), now = steps[Number(step.value)];
    viewer.querySelector("output").textContent = now;
    for (const image of viewer.querySelectorAll(".after img")) image.hidden = image.dataset.step !== now;
    for (const image of viewer.querySelectorAll(".before img")) image.hidden = image.dataset.name !== left.value;
  };
  step.addEventListener("input", show);
  left.addEventListener("input", show);
  for (const wipe of viewer.querySelectorAll(".wipe"))
    wipe.addEventListener("input", () => wipe.previousElementSibling.style.setProperty("--cut", wipe.value + "%"));
  show();
}
