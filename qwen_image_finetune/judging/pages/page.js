// Curves: the numbers stand in the page.
for (const place of document.querySelectorAll(".charts")) {
  const made = JSON.parse(place.textContent).map(({ title, unit, zero, series }) => new Chart(title, unit, series, { zero }));
  place.replaceChildren(...made.map((chart) => chart.element));
  new ResizeObserver(() => made.forEach((chart) => chart.draw())).observe(place);
}

// Each figure holds every picture of its pair; the controls above say which two of them are seen, and where they meet.
for (const viewer of document.querySelectorAll(".viewer")) {
  const step = viewer.querySelector("[data-control=step]"), left = viewer.querySelector("[data-control=left]");
  const show = () => {
    const steps = step.dataset.steps.split(","), now = steps[Number(step.value)];
    viewer.querySelector("output").textContent = now;
    for (const image of viewer.querySelectorAll(".after img")) image.hidden = image.dataset.step !== now;
    for (const image of viewer.querySelectorAll(".before img"))
      image.hidden = image.dataset.name !== left.value || (image.dataset.step ?? now) !== now;
  };
  step.addEventListener("input", show);
  left.addEventListener("input", show);
  for (const wipe of viewer.querySelectorAll(".wipe"))
    wipe.addEventListener("input", () => wipe.previousElementSibling.style.setProperty("--cut", wipe.value + "%"));
  show();
  enlarge([...viewer.querySelectorAll(".sides")], step, show);
}

// One picture as large as the screen: B, T and R show base, truth and reference, D what was drawn, A the same by the
// average of the weights; up and down are steps, left and right pairs.
function enlarge(figures, step, show) {
  const dialog = document.createElement("dialog");
  dialog.className = "large";
  dialog.tabIndex = -1; // keys are heard wherever the last click was
  dialog.innerHTML = "<div><img alt=''><p><output></output><span class='row'></span></p></div>";
  document.body.append(dialog);
  const shown = dialog.querySelector("img"), words = dialog.querySelector("output"), keys = dialog.querySelector(".row");
  let place = 0, name = "drawn";
  const images = () => Object.fromEntries([
    ["drawn", figures[place].querySelector(".after img:not([hidden])")],
    ...[...figures[place].querySelectorAll(".before img")]
      .filter((image) => !image.dataset.step || image.dataset.step === step.dataset.steps.split(",")[Number(step.value)])
      .map((image) => [image.dataset.name, image]),
  ].filter(([, image]) => image));
  const draw = () => {
    const found = images();
    if (!found[name]) name = Object.keys(found)[0];
    shown.src = found[name].src;
    shown.alt = found[name].alt;
    words.textContent = shown.alt;
    keys.replaceChildren(...Object.keys(found).map((each) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = each;
      button.setAttribute("aria-pressed", each === name);
      button.addEventListener("click", () => { name = each; draw(); });
      return button;
    }));
    dialog.focus();
  };
  const go = (by) => { place = (place + by + figures.length) % figures.length; draw(); };
  const later = (by) => { step.value = Number(step.value) + by; show(); draw(); };
  const turns = { ArrowLeft: () => go(-1), ArrowRight: () => go(1), ArrowUp: () => later(1), ArrowDown: () => later(-1) };
  dialog.addEventListener("keydown", (event) => {
    const letter = event.key.toLowerCase(), wanted = Object.keys(images()).find((each) => each.startsWith(letter));
    if (turns[event.key]) turns[event.key]();
    else if (wanted && letter.length === 1) { name = wanted; draw(); }
    else return;
    event.preventDefault();
  });
  shown.addEventListener("click", () => dialog.close());
  figures.forEach((figure, number) => {
    const open = () => { place = number; dialog.showModal(); draw(); };
    figure.addEventListener("click", open);
    figure.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); open(); } });
  });
}
