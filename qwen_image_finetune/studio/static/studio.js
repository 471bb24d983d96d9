"use strict";
const $ = (selector, inside = document) => inside.querySelector(selector);
const $$ = (selector, inside = document) => [...inside.querySelectorAll(selector)];
const query = (values) => new URLSearchParams(values).toString();

// Words at the corner of the page

const say = (words, bad = false) => {
  const line = document.createElement("p");
  line.textContent = words;
  if (bad) line.className = "bad";
  $(".notice").append(line);
  setTimeout(() => line.remove(), bad ? 9000 : 3500);
};

// Asking the studio

class Refusal extends Error {}

const answered = async (response) => {
  const told = response.headers.get("content-type")?.includes("json") ? await response.json() : { error: await response.text() };
  if (!response.ok) throw new Refusal(told.error || `the studio answers ${response.status}`);
  return told;
};
const post = async (address, ask, options = {}) =>
  answered(await fetch(address, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(ask), ...options }));
const get = async (address) => answered(await fetch(address));

const attempt = async (work) => {
  try { return await work(); } catch (error) {
    if (error.name === "AbortError") return undefined;
    say(error instanceof Refusal ? error.message : "The studio does not answer. Is it still open in the terminal?", true);
    return undefined;
  }
};

// Every other second, as long as somebody looks; a studio that is away is asked again.
const regularly = (seconds, work) => {
  let away = false;
  const round = async () => {
    let more = true;
    if (!document.hidden) {
      try { more = await work(); if (away) { away = false; say("The studio is back."); } } catch (error) {
        if (error instanceof Refusal) { say(error.message, true); return; }
        if (!away) { away = true; say("The studio does not answer; what runs goes on.", true); }
      }
    }
    if (more !== false) setTimeout(round, seconds * 1000);
  };
  round();
};

const duration = (seconds) => {
  const whole = Math.round(seconds), minutes = Math.floor(whole / 60), hours = Math.floor(minutes / 60);
  if (hours) return `${hours} h ${String(minutes % 60).padStart(2, "0")} min`;
  return minutes ? `${minutes} min ${String(whole % 60).padStart(2, "0")} s` : `${whole} s`;
};
const count = (number, one, many) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
const make = (name, values = {}, ...inside) => {
  const made = Object.assign(document.createElement(name), values);
  made.append(...inside);
  return made;
};

// What is the same on every page

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button, [data-open]");
  if (!button) return;
  if (button.dataset.open) {
    const target = $(button.dataset.open);
    if (target.tagName === "DIALOG") target.showModal();
    else { target.hidden = !target.hidden; if (!target.hidden) target.scrollIntoView({ block: "nearest" }); }
  }
  if ("close" in button.dataset) button.closest("dialog").close();
  if (button.dataset.post) {
    if (button.dataset.confirm && !confirm(button.dataset.confirm)) return;
    button.disabled = true;
    const told = await attempt(() => post(button.dataset.post, JSON.parse(button.dataset.ask)));
    button.disabled = false;
    if (told === undefined) return;
    if ("follow" in button.dataset) location.href = told.address;
    else if (button.dataset.to) location.href = button.dataset.to;
    else location.reload();
  }
});

document.addEventListener("submit", async (event) => {
  const form = event.target;
  if (!form.dataset.json) return;
  event.preventDefault();
  const ask = {};
  for (const field of form.elements) {
    if (!field.name) continue;
    if ("number" in field.dataset) { if (field.value.trim()) ask[field.name] = Number(field.value); } else ask[field.name] = field.value;
  }
  const told = await attempt(() => post(form.dataset.json, ask));
  if (told === undefined) return;
  if (form.dataset.go) location.href = form.dataset.go + encodeURIComponent(told.set);
  else if (form.dataset.then === "follow") location.href = told.address;
  else location.reload();
});

for (const select of $$("[data-go-select]")) select.addEventListener("change", () => { if (select.value) select.form.submit(); });

const wipe = (sides) => {
  const range = $("input[type=range]", sides);
  const show = () => sides.style.setProperty("--cut", `${range.value}%`);
  range?.addEventListener("input", show);
  if (range) show(); // a browser may have kept another value
};
$$(".sides").forEach(wipe);

// Pictures

const pictures = {
  home() {
    const queue = $("[data-queue]");
    if (!queue) return;
    const known = () => $$("[data-job]", queue).filter((each) => each.dataset.state !== "ended").map((each) => `${each.dataset.job} ${each.dataset.state}`).sort().join();
    regularly(2, async () => {
      const told = await get("/queue");
      if (told.jobs.map((job) => `${job.id} ${job.state}`).sort().join() !== known()) { location.reload(); return false; }
      for (const job of told.jobs) {
        const line = $(`[data-job="${job.id}"]`, queue), bar = $("progress", line), words = $("[data-progress]", line);
        if (job.step === null || !words) continue;
        if (bar && job.total) { bar.max = job.total; bar.value = job.step; }
        words.textContent = `${job.step.toLocaleString("en")}${job.total ? ` of ${job.total.toLocaleString("en")}` : ""} steps${job.seconds_left === null ? "" : `, ${duration(job.seconds_left)} left`}`;
      }
      $("[data-machine]").textContent = machineWords(told.machine);
      return true;
    });
  },

  data() {
    const set = $("[data-set]").dataset.set;
    for (const pair of $$(".pair")) {
      const field = $("[data-caption]", pair);
      field.dataset.stored = field.defaultValue; // what came with the page, whatever a browser has kept of an edit
      field.addEventListener("change", () => writeCaption(set, pair.dataset.key, field));
      field.addEventListener("keydown", (event) => {
        if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) field.blur();
        if (event.key === "Escape") { field.value = field.dataset.stored; field.blur(); }
      });
      $("[data-take]", pair)?.addEventListener("click", async () => {
        field.value = $("[data-proposal] span", pair).textContent;
        await writeCaption(set, pair.dataset.key, field);
        if (field.value === field.dataset.stored) $("[data-proposal]", pair).remove();
      });
      $("[data-mask]", pair)?.addEventListener("click", (event) => {
        const mask = $(".mask", pair);
        mask.hidden = !mask.hidden;
        event.currentTarget.setAttribute("aria-pressed", String(!mask.hidden));
      });
      $("[data-large]", pair).addEventListener("click", () => large.open(pair));
    }
    choose(set);
    $$(".drop").forEach((drop) => dropping(drop, (files) => send(set, drop.dataset.side, files)));
    for (const select of $$("[data-join]")) select.addEventListener("change", async () => {
      if (select.value && await attempt(() => post(select.dataset.join, { set, before: select.dataset.before, after: select.value }))) location.reload();
    });
    const look = $("[data-look]");
    look?.addEventListener("click", async () => { look.disabled = true; if (await attempt(() => post("/data/look", { set }))) watchLooking(set, look); });
    if (look && "going" in look.dataset) watchLooking(set, look);
    bulk(set);
  },
};

const machineWords = (machine) => [
  ...machine.cards.map((card) => `${card.name}: ${card.busy} % busy, ${card.memory} of ${card.of_memory} GiB`),
  `processor ${Math.round(machine.processor)} %, memory ${machine.memory} of ${machine.of_memory} GiB`,
].join(" · ");

const writeCaption = async (set, key, field) => {
  const told = await attempt(() => post("/data/caption", { set, key, before: field.dataset.stored, after: field.value }));
  if (told === undefined) return;
  field.value = field.dataset.stored = told.caption;
  say("Caption written.");
};

const choose = (set) => {
  const bar = $("[data-chosen]"), picks = $$(".pick"), chosen = () => picks.filter((each) => each.checked).map((each) => each.value);
  const show = () => {
    const keys = chosen();
    bar.hidden = !keys.length;
    $("span", bar).textContent = `${count(keys.length, "pair", "pairs")} chosen`;
    $("[data-scope]").textContent = keys.length ? `The ${count(keys.length, "pair", "pairs")} that are chosen.` : $("[data-scope]").dataset.all;
  };
  $("[data-scope]").dataset.all = $("[data-scope]").textContent;
  picks.forEach((each) => each.addEventListener("change", show));
  show();
  $("[data-none]", bar).addEventListener("click", () => { picks.forEach((each) => { each.checked = false; }); show(); });
  $("[data-throw]", bar).addEventListener("click", async () => {
    if (await attempt(() => post("/data/throw", { set, keys: chosen() }))) { say("In the bin."); location.reload(); }
  });
};

const watchLooking = (set, button) => regularly(1, async () => {
  const told = await get(`/data/looked?${query({ set })}`);
  button.textContent = told.total && told.done < told.total ? `looked at ${told.done} of ${told.total}` : "looking …";
  if (!told.going) location.reload();
  return told.going;
});

const bulk = (set) => {
  const form = $("[data-captions]"), button = $("button.main", form);
  let round = 0;
  const ask = (write) => ({ set, keys: $$(".pick").filter((each) => each.checked).map((each) => each.value), write,
    ...Object.fromEntries(["find", "replace", "prefix", "suffix"].map((name) => [name, form.elements[name].value])) });
  form.addEventListener("input", async () => {
    const mine = ++round;
    const told = await attempt(() => post("/data/captions", ask(false)));
    if (told === undefined || mine !== round) return;
    button.disabled = !told.changes;
    $("[data-count]", form).textContent = told.changes ? `${count(told.changes, "caption changes", "captions change")}:` : "Nothing changes.";
    $(".changes", form).replaceChildren(...told.shown.map((each) => make("div", {}, make("b", { className: "small", textContent: each.key }), make("div", {}, make("del", { textContent: each.before || "(empty)" })), make("div", {}, make("ins", { textContent: each.after || "(empty)" })))));
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const told = await attempt(() => post("/data/captions", ask(true)));
    if (told !== undefined) location.reload();
  });
};

// One large picture at a time

const large = {
  pairs: [], place: 0,
  open(pair) { this.pairs = $$(".pair"); this.place = this.pairs.indexOf(pair); this.show(); $("#large").showModal(); },
  show() {
    const dialog = $("#large"), pair = this.pairs[this.place], copy = $(".sides", pair).cloneNode(true);
    $(".corner", copy).remove();
    for (const image of $$("img[data-full]", copy)) { image.src = image.dataset.full; image.loading = "eager"; }
    wipe(copy);
    dialog.firstElementChild.replaceChildren(copy);
    $("[data-said]", dialog).textContent = `${pair.dataset.key}: ${$("[data-caption]", pair).value}`;
  },
  move(by) { this.place = (this.place + by + this.pairs.length) % this.pairs.length; this.show(); },
};
for (const button of $$("#large [data-step]")) button.addEventListener("click", () => large.move(Number(button.dataset.step)));
$("#large")?.addEventListener("keydown", (event) => {
  if (event.target.type === "range") return;
  if (event.key === "ArrowRight") large.move(1);
  if (event.key === "ArrowLeft") large.move(-1);
});

// Files that are dropped

const dropping = (drop, take) => {
  const input = $("input", drop);
  const chosen = () => { if (input.files.length) take([...input.files].map((file) => [file.webkitRelativePath || file.name, file])); };
  input.addEventListener("change", chosen);
  chosen(); // what was chosen before this script had loaded
  for (const kind of ["dragenter", "dragover"]) drop.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over-it"); });
  for (const kind of ["dragleave", "drop"]) drop.addEventListener(kind, () => drop.classList.remove("over-it"));
  drop.addEventListener("drop", async (event) => { event.preventDefault(); take(await filesOf(event.dataTransfer)); });
};

const filesOf = async (transfer) => {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files].map((file) => [file.name, file]);
  const found = [];
  const walk = async (entry, above) => {
    if (entry.isFile) found.push([above + entry.name, await new Promise((done, fail) => entry.file(done, fail))]);
    else {
      const reader = entry.createReader();
      for (;;) { // a browser hands out a hundred at a time
        const part = await new Promise((done, fail) => reader.readEntries(done, fail));
        if (!part.length) break;
        for (const each of part) await walk(each, `${above}${entry.name}/`);
      }
    }
  };
  for (const entry of entries) await walk(entry, "");
  return found;
};

const send = async (set, side, files) => {
  const box = $("[data-sending]"), bar = $("progress", box), words = $("[data-said]", box), refused = [];
  box.hidden = false; bar.max = files.length;
  let taken = 0;
  for (const [place, [name, file]] of files.entries()) {
    bar.value = place; words.textContent = `${place + 1} of ${files.length}: ${name}`;
    const given = name.toLowerCase().endsWith(".zip") ? "" : side;
    const told = await attempt(async () => answered(await fetch(`/inbox/upload?${query({ set, side: given, name })}`, { method: "POST", headers: { "content-type": "application/octet-stream" }, body: file })));
    if (told === undefined) break;
    taken += told.taken; refused.push(...told.refused);
  }
  bar.value = files.length;
  if (!refused.length) { location.reload(); return; }
  words.replaceChildren(`${count(taken, "file", "files")} taken, ${refused.length} not:`, make("ul", {}, ...refused.map(([name, why]) => make("li", { textContent: `${name}: ${why}` }))));
  if (taken) words.append(make("button", { textContent: "Show what arrived", onclick: () => location.reload() }));
};

// A new run

const form = {
  new() {
    const place = $("[data-draft]"), text = $("[data-yaml]", place);
    let waiting, planning, round = 0;
    const fields = $$("[data-fields] [name]", place);
    const show = (told, keepText = false) => {
      if (!keepText) text.value = told.yaml;
      for (const field of fields) {
        if (field === document.activeElement) continue;
        const value = told.values[field.name] ?? "";
        if (field.tagName === "SELECT" && value && ![...field.options].some((each) => each.value === value || each.text === value)) field.add(new Option(value));
        field.value = value;
      }
      for (const label of $$("[data-key]", place)) {
        const wrong = told.problems.filter((each) => each.keys.includes(label.dataset.key)).map((each) => each.words.replace(`${label.dataset.key}=`, ""));
        label.classList.toggle("has-problem", wrong.length > 0);
        const words = $(".wrong", label);
        words.hidden = !wrong.length; words.textContent = wrong.join("\n");
        if (wrong.length) label.closest("details")?.setAttribute("open", "");
      }
      const named = new Set($$("[data-key]", place).map((each) => each.dataset.key));
      const rest = told.problems.filter((each) => !each.keys.some((key) => named.has(key))).map((each) => each.words);
      const general = $("[data-general]", place), notes = $("[data-notes]", place);
      general.hidden = !rest.length; general.textContent = rest.join("\n");
      notes.hidden = !told.notes.length; notes.textContent = told.notes.join("\n");
      $("[data-start]", place).disabled = told.problems.length > 0;
      clearTimeout(waiting); planning?.abort();
      if (told.problems.length) $("[data-plan]", place).replaceChildren(make("p", { className: "soft", textContent: "Once nothing is wrong any more." }));
      else waiting = setTimeout(plan, 700);
    };
    const plan = async () => {
      const box = $("[data-plan]", place);
      box.replaceChildren(make("p", { className: "soft", textContent: "Working it out …" }), make("progress", { ariaLabel: "working it out" }));
      planning = new AbortController();
      const mine = planning;
      try {
        showPlan(box, await post("/new/plan", { yaml: text.value, card: $("[data-card]", place).value }, { signal: planning.signal }), async (keys) => {
          const told = await attempt(() => post("/new/change", { yaml: text.value, keys }));
          if (told) show(told);
        });
      } catch (error) {
        if (error.name !== "AbortError" && mine === planning) box.replaceChildren(make("p", { className: "wrong", textContent: error.message }));
      }
    };
    for (const field of fields) field.addEventListener("change", async () => {
      const mine = ++round;
      const told = await attempt(() => post("/new/check", { yaml: text.value, key: field.name, value: field.value }));
      if (told && mine === round) show(told);
    });
    for (const each of $$("form[data-fields]", place)) each.addEventListener("submit", (event) => event.preventDefault());
    let typing;
    text.addEventListener("input", () => {
      clearTimeout(typing);
      typing = setTimeout(async () => { const mine = ++round; const told = await attempt(() => post("/new/check", { yaml: text.value })); if (told && mine === round) show(told, true); }, 300);
    });
    $("[data-card]", place).addEventListener("change", plan);
    $("[data-start]", place).addEventListener("click", async (event) => {
      event.currentTarget.disabled = true;
      const told = await attempt(() => post("/new/start", { yaml: text.value }));
      if (told) location.href = told.address; else $("[data-start]", place).disabled = false;
    });
    show(JSON.parse($("#checked").textContent));
  },
};

const gib = (value) => `${value.toFixed(1)} GiB`;

const showPlan = (box, plan, apply) => {
  const parts = [];
  const verdict = plan.fits === null ? "No card here" : plan.fits ? "It fits" : "It does not fit";
  parts.push(make("p", { className: `verdict ${plan.fits === null ? "" : plan.fits ? "fits" : "not"}`, textContent: verdict }));
  if (plan.card !== null) {
    const meter = make("progress", { max: plan.card, value: Math.min(plan.peak + plan.driver, plan.card), ariaLabel: "share of the card's memory" });
    parts.push(meter);
  }
  const facts = make("dl", { className: "facts" });
  const fact = (name, value) => facts.append(make("dt", { textContent: name }), make("dd", { textContent: value }));
  fact("memory of the card", `${gib(plan.peak + plan.driver)}${plan.card === null ? "" : ` of ${gib(plan.card)}`}`);
  if (plan.encoding > 0.05) fact("while preparing pictures", gib(plan.encoding));
  fact("memory of the machine", gib(Object.values(plan.on_host).reduce((sum, each) => sum + each, 0)));
  if (plan.step_seconds !== null) fact("one step", `${plan.step_seconds.toFixed(2)} s`);
  if (plan.seconds !== null) fact("all of it", duration(plan.seconds));
  fact("model", `${plan.family}, ${(plan.weights / 1e9).toFixed(plan.weights > 1e9 ? 1 : 3)} billion weights, ${plan.base === "no" ? "32 bits" : plan.base}`);
  parts.push(facts);
  if (plan.change) {
    const words = Object.entries(plan.change.keys).map(([key, value]) => `${key} = ${JSON.stringify(value)}`).join("\n");
    parts.push(make("p", { textContent: `What makes it fit (${gib(plan.change.peak + plan.driver)}) and costs ${plan.change.price}:` }), make("pre", { textContent: words }),
      make("button", { type: "button", className: "main", textContent: "Change that", onclick: () => apply(plan.change.keys) }));
  } else if (plan.last_resort) parts.push(make("p", { textContent: `What is left: ${plan.last_resort}` }));
  if (plan.problems.length) parts.push(make("p", { className: "wrong", textContent: plan.problems.join("\n") }));
  if (plan.notes.length) parts.push(make("p", { className: "soft small", textContent: plan.notes.join("\n") }));
  box.replaceChildren(...parts);
};

// Watching

const watching = {
  watch() {
    const place = $("[data-watch]"), { run, job, kind } = place.dataset;
    let offset = 0, steps = [], strips = [], follow = true;
    const curves = new Curves($("[data-curves] .charts", place), [{ id: run, title: run }]);
    const samples = $("[data-samples]", place), slider = $("[data-step]", samples), left = $("[data-left]", samples);

    const showSamples = () => {
      const step = steps[Number(slider.value)];
      $("[data-step-said]", samples).textContent = step?.toLocaleString("en") ?? "";
      for (const [number, figure] of $$("figure", samples).entries()) {
        const strip = strips[number], part = (name) => strip.parts.findIndex((each) => each.name === name);
        const picture = (which) => `/watch/sample?${query({ run, step, place: number, part: which })}`;
        const [before, after] = $$("img", figure);
        const drawn = part("drawn"), other = Math.max(part(left.value), 0);
        before.src = picture(other); before.alt = `${left.value} of ${strip.key}`;
        after.src = picture(drawn); after.alt = `${strip.key} drawn at step ${step}`;
        figure.classList.toggle("pixelated", strip.parts[drawn].width < 200);
      }
    };
    const takeSamples = (told) => {
      if (!told.steps.length) return;
      const fresh = told.steps.join() !== steps.join();
      if (!fresh) return;
      follow = !steps.length || Number(slider.value) === steps.length - 1;
      steps = told.steps; strips = told.strips; samples.hidden = false;
      slider.max = steps.length - 1; slider.disabled = steps.length < 2;
      if (follow) slider.value = steps.length - 1;
      const names = [...new Set(strips.flatMap((each) => each.parts.map((part) => part.name)).filter((name) => name !== "drawn"))];
      if (left.options.length !== names.length) left.replaceChildren(...names.map((name) => new Option(name)));
      const grid = $(".samples", samples);
      if (grid.children.length !== strips.length) grid.replaceChildren(...strips.map((strip) => {
        const range = make("input", { type: "range", min: 0, max: 100, value: 50, ariaLabel: `where the pictures of ${strip.key} meet` });
        const sides = make("div", { className: "sides two" }, make("img"), make("div", { className: "after" }, make("img")), range);
        const width = strip.parts[0].width;
        sides.style.aspectRatio = "1"; sides.dataset.width = width;
        wipe(sides);
        return make("figure", {}, sides, make("figcaption", {}, make("b", { textContent: strip.key }), ` ${strip.prompt}`));
      }));
      showSamples();
    };
    slider.addEventListener("input", showSamples);
    left.addEventListener("input", showSamples);
    document.addEventListener("keydown", (event) => {
      if (event.target.matches("input, textarea, select") || event.ctrlKey || event.metaKey || !steps.length) return;
      const side = { b: "base", t: "truth", r: "reference" }[event.key];
      if (side && [...left.options].some((each) => each.value === side)) { left.value = side; showSamples(); }
      if (event.key === "ArrowLeft" || event.key === "ArrowRight") { slider.value = Number(slider.value) + (event.key === "ArrowRight" ? 1 : -1); showSamples(); }
    });

    const show = (told) => {
      const state = told.job && (kind !== "train" || told.job !== "done") ? told.job : told.state ?? told.job ?? "waiting";
      const words = { running: "running", finished: "finished", done: "done", failed: "failed", killed: "broke off", interrupted: "stopped", stopped: "stopped", waiting: "waiting" };
      $("[data-state]", place).replaceChildren(make("span", { className: `tag ${state}`, textContent: words[state] ?? state }));
      const going = state === "running" || state === "waiting";
      for (const each of $$("[data-when]", place)) each.hidden = !(each.dataset.when === state || (each.dataset.when === "ended" && !going && state !== "finished" && told.checkpoints?.length));
      const bar = $("[data-bar]", place);
      bar.hidden = !going;
      if (kind === "train" && told.total && told.step) { bar.max = told.total; bar.value = told.step; } else bar.removeAttribute("value");
      $("[data-last]", place).textContent = going && (kind !== "train" || !told.step) ? told.log.trimEnd().split("\n").at(-1) : "";
      const log = $("[data-log]", place);
      if (told.log && log.textContent !== told.log) { log.textContent = told.log; log.scrollTop = log.scrollHeight; }
      if (told.step === undefined) return going;
      const last = (name) => { for (const chart of curves.charts) for (const each of chart.series) if (each.metric === name && each.points.length) return each.points.at(-1)[1]; return undefined; };
      const figures = [["step", told.total ? `${told.step.toLocaleString("en")} of ${told.total.toLocaleString("en")}` : told.step.toLocaleString("en")]];
      if (told.seconds_left !== null) figures.push(["time left", duration(told.seconds_left)]);
      if (told.seconds_a_step !== null) figures.push(["one step", `${told.seconds_a_step.toFixed(2)} s`]);
      const loss = last("loss"), difference = last("held_out_difference"), memory = last("memory_gib");
      if (loss !== undefined) figures.push(["loss", shortNumber(loss)]);
      if (difference !== undefined) figures.push(["unseen pairs, against no LoRA", (difference > 0 ? "+" : "") + shortNumber(difference)]);
      if (memory !== undefined) figures.push(["memory", gib(memory)]);
      if (going && told.machine) for (const card of told.machine.cards) figures.push([card.name, `${card.busy} % busy`]);
      $("[data-figures]", place).hidden = false;
      $("[data-figures]", place).replaceChildren(...figures.map(([name, value]) => make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value }))));
      const saved = $("[data-saved]", place), rows = told.checkpoints.map((each) => each.name + each.best).join();
      saved.hidden = !told.checkpoints.length;
      if (saved.dataset.rows !== rows) {
        saved.dataset.rows = rows;
        $("tbody", saved).replaceChildren(...told.checkpoints.toReversed().map((each) => {
          const step = make("th", { scope: "row", textContent: each.step.toLocaleString("en") });
          if (each.best) step.append(" ", make("span", { className: "tag done", textContent: "best on unseen pairs" }));
          const links = [["diffusers", "diffusers"], ["comfy", "ComfyUI"], ["kohya", "kohya"]].map(([format, name]) =>
            make("a", { href: `/download?${query({ run, checkpoint: each.name, format })}`, textContent: name, download: "" }));
          return make("tr", {}, step, make("td", { textContent: each.mib === null ? "whole model" : `${each.mib} MiB` }), make("td", {}, each.mib === null ? "" : make("span", { className: "row" }, ...links)));
        }));
      }
      return going;
    };

    regularly(2, async () => {
      const told = await get(`/watch/live?${query({ run, job, offset })}`);
      if (!run && told.run && kind === "train") { location.replace(`/watch?${query({ run: told.run, job })}`); return false; }
      if (told.lines) {
        offset = told.offset;
        $("[data-curves]", place).hidden = !told.lines.length && offset === 0;
        curves.feed(run, told.lines, told.again);
        takeSamples(told.samples);
        if (!$("[data-actions] a", place) && told.step > 0) { location.reload(); return false; }
      }
      const before = place.dataset.going, going = show(told);
      place.dataset.going = going;
      if (before === "true" && !going && kind === "evaluate") location.reload();
      return going || told.step === undefined && told.job === null;
    });
  },

  async compare() {
    const place = $("[data-compare]"), names = JSON.parse(place.dataset.compare);
    const curves = new Curves($(".charts", place), names.map((id) => ({ id, title: id.split("/").slice(-2).join("/") })));
    for (const run of names) {
      const told = await attempt(() => get(`/watch/live?${query({ run, offset: 0 })}`));
      if (told) curves.feed(run, told.lines, false);
    }
    $("[data-add-run]")?.addEventListener("change", (event) => { location.search = new URLSearchParams([...names, event.target.value].map((name) => ["run", name])); });
  },

  runs() {
    const button = $("[data-choose]"), boxes = $$("input[name=run]"), chosen = () => boxes.filter((each) => each.checked);
    boxes.forEach((each) => each.addEventListener("change", () => { button.disabled = chosen().length < 2; button.textContent = chosen().length ? `Compare ${chosen().length}` : "Compare"; }));
    button.addEventListener("click", () => { location.href = `/compare?${new URLSearchParams(chosen().map((each) => ["run", each.value]))}`; });
  },
};

// Trying

const trying = {
  try() {
    const place = $("[data-try]");
    if (!place) return;
    const drop = $("[data-picture]", place);
    let dropped = sessionStorage.getItem("dropped");
    const showPicture = () => { if (dropped) $(".small", drop).replaceChildren(make("img", { className: "thumb", alt: "the picture", src: `/try/dropped?${query({ name: dropped })}`, onerror: () => { dropped = null; sessionStorage.removeItem("dropped"); $(".small", drop).textContent = "drop one here, or choose it"; } })); };
    dropping(drop, async ([[, file]]) => {
      const told = await attempt(async () => answered(await fetch("/try/drop", { method: "POST", headers: { "content-type": "application/octet-stream" }, body: file })));
      if (!told) return;
      dropped = told.name; sessionStorage.setItem("dropped", dropped); showPicture();
    });
    showPicture();
    place.addEventListener("submit", async (event) => {
      event.preventDefault();
      const fields = place.elements, steps = fields.steps.value.trim();
      const ask = {
        run: place.dataset.try, dropped, prompt: fields.prompt.value,
        checkpoints: $$("[name=checkpoint]", place).filter((each) => each.checked).map((each) => each.value),
        strengths: fields.strengths.value.trim().split(/[\s,;]+/).filter(Boolean).map(Number), seed: Number(fields.seed.value || 0), steps: steps ? Number(steps) : null,
      };
      const told = await attempt(() => post("/try/draw", ask));
      if (told) location.href = told.address;
    });
    pushing($("[data-push]"));
    const grid = $("[data-grid]"), job = grid.dataset.grid;
    if (!job) return;
    regularly(1.5, async () => {
      const told = await get(`/try/grid?${query({ job })}`);
      const words = { running: "drawing", waiting: "waits for the card", done: "done", failed: "failed", killed: "broke off", stopped: "stopped" };
      $("[data-state]", grid).replaceChildren(make("span", { className: `tag ${told.state}`, textContent: words[told.state] }));
      $("[data-log]", grid).textContent = told.log;
      for (const cell of $$("[data-place]", grid)) {
        const box = cell.firstElementChild, number = Number(cell.dataset.place);
        if (told.cells[number].ready && !$("img", box)) box.replaceChildren(make("img", { alt: `drawn with ${told.cells[number].checkpoint} at strength ${told.cells[number].strength}`, src: `/try/drawn?${query({ job, place: number })}` }));
      }
      return told.state === "running" || told.state === "waiting";
    });
  },
};

// Nothing is sent that was not shown: a change of the form takes back what was shown.
const pushing = (place) => {
  if (!place) return;
  const box = $("[data-shown]", place), fields = place.elements;
  let shown = null;
  const ask = () => ({ run: place.dataset.push, repository: fields.repository.value.trim(), step: Number(fields.step.value), pictures: fields.pictures.checked, public: fields.public.checked });
  place.addEventListener("input", () => { box.hidden = true; shown = null; });
  place.addEventListener("submit", async (event) => {
    event.preventDefault();
    const told = await attempt(() => post("/push/show", ask()));
    if (!told) return;
    shown = told.shown;
    $("[data-card]", box).textContent = told.card;
    $("[data-files]", box).textContent = told.files.map((file) => `${file.name}, ${file.mib} MiB`).join("; ");
    $("[data-send]", box).textContent = ask().public ? "Send, for everybody to see" : "Send, in private";
    box.hidden = false;
  });
  $("[data-send]", box).addEventListener("click", async () => {
    const told = await attempt(() => post("/push/send", { ...ask(), shown }));
    if (told) location.href = told.address;
  });
};

({ ...pictures, ...form, ...watching, ...trying })[document.body.dataset.page]?.();
$("main").inert = false;
