// The grid of heads: colours and numbers of one measure, at one step or over all.
const everyHead = document.getElementById("every-head");
if (everyHead) {
  const data = JSON.parse(document.getElementById("measures").textContent);
  const find = (name) => everyHead.querySelector(`[data-role=${name}]`);
  const [slider, stepName, legend, about, curve] = ["step", "step-name", "legend", "about", "curve"].map(find);
  const measures = ["class", "density", "recall", "error"];
  const buttons = [...everyHead.querySelectorAll("[data-layer]")];
  const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
  let measure = "class", chosen = null;

  const place = (button) => {
    const { transformer, layer, head } = button.dataset;
    const of = data.transformers[transformer];
    return { of, index: Number(layer) * of.heads + Number(head) };
  };
  const values = (button, step) => {
    const { of, index } = place(button);
    return (step < 0 ? of.means : of.steps[step].heads)[index];
  };
  // One scale for all steps, so that a colour keeps its meaning while the slider moves.
  const range = (column) => {
    const all = data.transformers.flatMap((t) => [t.means, ...t.steps.map((s) => s.heads)].flat().map((h) => h[column]));
    // Not Math.min(...all): large models have more numbers than a function takes arguments.
    const furthest = (pick, start) => all.reduce((found, value) => pick(found, value), start);
    if (measure === "recall") return [furthest(Math.min, 0.9), 1];
    return [0, measure === "error" ? furthest(Math.max, 0.01) : 1];
  };
  const paint = () => {
    const step = Number(slider.value), column = measures.indexOf(measure);
    const [low, high] = column ? range(column) : [0, 1];
    for (const button of buttons) {
      const value = values(button, step)[column];
      const isDense = values(button, step)[0] === "dense";
      const share = column ? (value - low) / (high - low) : 1;
      const full = measure === "error" ? "var(--warm)" : "var(--accent)";
      const colour = column ? full : data.colours[value] ?? data.colours.other;
      button.style.background = isDense ? data.colours.dense : `color-mix(in srgb, ${colour} ${100 * share}%, var(--page))`;
      // Of the colours of classes only that of the spatial heads is darker than its text.
      const onClass = value === "spatial" ? "#fff" : "#111";
      button.style.color = isDense || !column ? onClass : share > 0.5 ? "var(--page)" : "var(--ink)";
      button.textContent = isDense ? "dense" : column ? percent(value) : value;
      button.title = describe(button, step);
      button.classList.toggle("chosen", button === chosen);
    }
    const reasons = step < 0 ? [] : data.transformers.flatMap((t) => Object.keys(t.steps[step].dense));
    stepName.textContent = step < 0 ? "mean over the sparse steps" : `step ${step} of 0–${data.steps - 1}`;
    legend.textContent = (column ? `${measure}: pale is ${percent(low)}, strong is ${percent(high)}. ` : "")
      + (step < 0 ? "The slider goes through the steps." : "")
      + (reasons.length ? `Dense at this step: ${[...new Set(reasons)].join(", ")}.` : "");
    for (const b of everyHead.querySelectorAll("[data-measure]")) {
      b.setAttribute("aria-pressed", b.dataset.measure === measure);
    }
    drawCurve();
  };
  const describe = (button, step) => {
    const [name, density, recall, error] = values(button, step);
    const { transformer, layer, head } = button.dataset;
    const what = name === "dense" ? "dense" : `${name}, density ${percent(density)}, recall ${percent(recall)}, error ${percent(error)}`;
    const prefix = data.transformers.length > 1 ? `${data.transformers[transformer].name}, ` : "";
    return `${prefix}layer ${layer}, head ${head}: ${what}`;
  };

  // Recall and error of one head over the steps.
  const drawCurve = () => {
    const [left, right, top, bottom] = [40, 580, 12, 160];
    const { of, index } = place(chosen);
    const x = (step) => left + (right - left) * (data.steps > 1 ? step / (data.steps - 1) : 0.5);
    const y = (share) => bottom - (bottom - top) * Math.min(1, share);
    const parts = [];
    const add = (kind, attributes, content) => parts.push([kind, attributes, content]);
    for (const share of [0, 0.5, 1]) {
      add("line", { class: "grid", x1: left, x2: right, y1: y(share), y2: y(share) });
      add("text", { x: left - 6, y: y(share) + 4, "text-anchor": "end" }, percent(share).replace("0.0", "0"));
    }
    const every = Math.ceil(data.steps / 10);
    for (let step = 0; step < data.steps; step += every) add("text", { x: x(step), y: 180, "text-anchor": "middle" }, step);
    for (const [name, column] of [["recall", 2], ["error", 3]]) {
      const points = of.steps.map((s, step) => [step, s.heads[index]]).filter(([, h]) => h && h[0] !== "dense");
      if (!points.length) continue;
      add("polyline", { class: name, points: points.map(([step, h]) => `${x(step)},${y(h[column])}`).join(" ") });
      for (const [step, h] of points) add("circle", { class: name, cx: x(step), cy: y(h[column]), r: 3, fill: "currentColor" });
      const last = points[points.length - 1];
      add("text", { class: name, x: x(last[0]) + 8, y: y(last[1][column]) + 4 }, name);
    }
    if (Number(slider.value) >= 0) {
      add("line", { class: "now", x1: x(Number(slider.value)), x2: x(Number(slider.value)), y1: top, y2: bottom });
    }
    curve.replaceChildren(...parts.map(([kind, attributes, content]) => {
      const element = document.createElementNS("http://www.w3.org/2000/svg", kind);
      for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
      if (content !== undefined) element.textContent = content;
      return element;
    }));
    about.textContent = describe(chosen, Number(slider.value));
  };
  slider.addEventListener("input", paint);
  for (const b of everyHead.querySelectorAll("[data-measure]")) {
    b.addEventListener("click", () => { measure = b.dataset.measure; paint(); });
  }
  for (const b of buttons) b.addEventListener("click", () => { chosen = b; paint(); });
  // The worst head to begin with.
  chosen = buttons.reduce((worst, b) => (values(b, -1)[3] > values(worst, -1)[3] ? b : worst));
  paint();
}

// The maps of a head: one step at a time.
for (const section of document.querySelectorAll(".maps")) {
  const buttons = [...section.querySelectorAll("button")], figures = [...section.querySelectorAll("figure")];
  const show = (step) => {
    for (const figure of figures) figure.hidden = figure.dataset.step !== step;
    for (const button of buttons) button.setAttribute("aria-pressed", button.dataset.step === step);
  };
  section.querySelector(".choice").hidden = buttons.length < 2;
  for (const button of buttons) button.addEventListener("click", () => show(button.dataset.step));
  show(figures[0].dataset.step);
}
