"use strict";

const X_TITLES = { updates: "updates", tokens: "tokens", hours: "hours of training" };
const dark = matchMedia("(prefers-color-scheme: dark)");
const touch = matchMedia("(pointer: coarse)").matches;
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const charts = [...document.querySelectorAll(".chart")].map((box) => ({
  box,
  plot: box.querySelector(".plot"),
  ...JSON.parse(box.querySelector("script").textContent),
}));
const positions = charts.flatMap(({ data }) => data.map((trace) => trace.meta?.x).filter(Boolean));
const state = { x: "updates", smooth: false };

// The layout of a chart in the colours of the theme. The chart's own settings win.
function themed(layout) {
  const ink = color("--ink"), soft = color("--soft"), line = color("--line"), card = color("--card");
  const full = {
    height: 300, margin: { l: 8, r: 12, t: 10, b: 8 },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: ink } },
    xaxis: {}, yaxis: {}, ...layout,
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: soft, ...layout.font },
    hoverlabel: { bgcolor: card, bordercolor: line, font: { color: ink }, namelength: -1, ...layout.hoverlabel },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: soft, activecolor: ink },
    dragmode: touch ? false : "zoom",
  };
  for (const name of Object.keys(full).filter((key) => /^[xy]axis\d*$/.test(key))) {
    full[name] = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true,
      exponentformat: "SI", ...full[name] };
  }
  return full;
}

// The same horizontal axis on all charts over updates, tokens or hours.
function placeAxes(full) {
  const end = Math.max(...positions.map((x) => x[state.x].at(-1)));
  Object.assign(full, { hovermode: "x unified" });
  Object.assign(full.xaxis, { title: { text: X_TITLES[state.x] }, range: [0, end],
    hoverformat: { updates: ",d", tokens: ".4s", hours: ".3f" }[state.x] });
}

// A logarithmic axis writes its numbers out and, over one to four decades, labels 1, 2 and 5.
function labelDecades(axis, data) {
  const values = data.flatMap(({ y }) => y.filter((value) => value > 0));
  const [low, high] = values.reduce(([a, b], y) => [Math.min(a, y), Math.max(b, y)], [Infinity, 0]);
  axis.tickformat = "~g";
  if (high > 10 * low && high < 1e4 * low) axis.dtick = "D2";
}

// Traces at the chosen horizontal positions, with their smoothed companions or without.
function placed(data) {
  return data.map((trace) => {
    const { x, role } = trace.meta ?? {};
    return { ...trace, ...(x && { x: x[state.x] }),
      ...(role === "smooth" && { visible: state.smooth }),
      ...(role === "raw" && state.smooth && { opacity: 0.25 }) };
  });
}

function draw({ plot, data, layout }) {
  const full = themed(layout);
  if (data.some((trace) => trace.meta?.x)) placeAxes(full);
  if (full.yaxis.type === "log") labelDecades(full.yaxis, data);
  if (full.showlegend) { // the legend must not make the plot flatter
    const width = data.filter((trace) => trace.showlegend !== false)
      .reduce((sum, { name }) => sum + 50 + 7 * name.length, 0);
    full.height += 20 * Math.ceil(width / plot.clientWidth);
  }
  plot.style.height = `${full.height}px`;
  return Plotly.react(plot, placed(data), full, { responsive: true, displaylogo: false,
    displayModeBar: touch || data[0].type === "heatmap" ? false : "hover",
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] });
}

const drawAll = () => Promise.all(charts.map(draw));

function button(text, pressed, onClick) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.setAttribute("aria-pressed", pressed);
  made.onclick = () => onClick(made);
  return made;
}

function addControls(controls) {
  const choices = Object.keys(X_TITLES).filter((name) => positions.every((x) => x[name]));
  if (positions.length && choices.length > 1) {
    const choose = document.createElement("span");
    choose.className = "switch";
    choose.append(...choices.map((name) => button(name, name === state.x, (chosen) => {
      state.x = name;
      for (const other of choose.children) other.setAttribute("aria-pressed", other === chosen);
      drawAll();
    })));
    controls.append("Over", choose);
  }
  const partial = Object.keys(X_TITLES)
    .filter((name) => positions.some((x) => x[name]) && !choices.includes(name));
  if (partial.length) controls.append(`(${partial.join(" and ")} not recorded by every run)`);
  if (charts.some(({ data }) => data.some((trace) => trace.meta?.role === "smooth"))) {
    const label = document.createElement("label");
    const box = document.createElement("input");
    box.type = "checkbox";
    box.onchange = () => { state.smooth = box.checked; drawAll(); };
    label.append(box, "smooth");
    controls.append(label);
  }
}

for (const chart of charts.filter(({ layout }) => layout.meta?.log)) {
  chart.layout.yaxis ??= {};
  chart.box.append(button("log", chart.layout.yaxis.type === "log", (pressed) => {
    const log = chart.layout.yaxis.type !== "log";
    chart.layout.yaxis.type = log ? "log" : "linear";
    pressed.setAttribute("aria-pressed", log);
    draw(chart);
  }));
  chart.box.lastChild.className = "log";
}

// A word too long for its line breaks inside itself, not between the indentation and the word.
for (const node of [...document.querySelectorAll(".text")].flatMap((text) => [...text.childNodes])) {
  node.textContent = node.textContent.replace(/\n +/g, (indent) => indent.replaceAll(" ", "\u00a0"));
}

if (document.getElementById("controls")) addControls(document.getElementById("controls"));
dark.addEventListener("change", drawAll);
drawAll().then(() => document.documentElement.setAttribute("data-drawn", charts.length));
