"use strict";

// Colours the tokens of every text by the chosen quantity, layer and iteration.
for (const box of document.querySelectorAll(".probe")) {
  const data = JSON.parse(box.querySelector("script").textContent);
  const tokens = [...box.querySelector(".tokens").children];
  const reading = box.querySelector(".reading");
  const [layers, iterations] = [data.rms_error.values.length, data.rms_error.values[0].length];
  const state = { name: "rms_error", layer: layers, iteration: iterations, token: null };
  const number = (value) => (value === null ? "none" : String(Number(value.toPrecision(3))));
  const make = (tag, fields) => Object.assign(document.createElement(tag), fields);

  const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  function colorAt(colors, share) {
    const at = Math.min(Math.max(share, 0), 1) * (colors.length - 1);
    const low = Math.min(Math.floor(at), colors.length - 2);
    const [a, b] = [rgb(colors[low]), rgb(colors[low + 1])];
    return a.map((value, i) => value + (at - low) * (b[i] - value));
  }
  const linear = (part) => (part <= 10.3 ? part / 3295 : ((part / 255 + 0.055) / 1.055) ** 2.4);
  const isLight = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b) > 0.179;

  const slider = (name, max) => {
    const input = make("input", { type: "range", min: 1, max, step: 1, value: state[name] });
    const shown = make("output", {});
    const label = make("label", {});
    label.append(name, input, shown);
    input.oninput = () => { stop(); state[name] = Number(input.value); color(); };
    return { label, show: () => { input.value = state[name]; shown.value = `${state[name]} of ${max}`; } };
  };
  const select = make("select", { ariaLabel: "quantity" });
  for (const [name, { title }] of Object.entries(data)) select.append(make("option", { value: name, textContent: title }));
  select.onchange = () => { state.name = select.value; color(); };
  const sliders = [slider("layer", layers), slider("iteration", iterations)];
  const scale = make("span", { className: "scale" });
  const [lowest, ramp, highest] = ["span", "span", "span"].map((tag) => make(tag, {}));
  ramp.className = "ramp";
  scale.append(lowest, ramp, highest);

  // Plays all iterations of all layers, as a token passes through them.
  let timer = null;
  const play = make("button", { type: "button", className: "play", textContent: "▶ play" });
  function stop() { clearInterval(timer); timer = null; play.textContent = "▶ play"; }
  play.onclick = () => {
    if (timer) return stop();
    Object.assign(state, { layer: 1, iteration: 1 });
    color();
    play.textContent = "■ stop";
    timer = setInterval(() => {
      if (state.iteration < iterations) state.iteration += 1;
      else if (state.layer < layers) Object.assign(state, { layer: state.layer + 1, iteration: 1 });
      else return stop();
      color();
    }, Math.max(120, Math.min(600, 12000 / (layers * iterations))));
  };
  box.querySelector(".choices").append(select, ...sliders.map(({ label }) => label), play, scale);

  function color() {
    const { colors, limits, values } = data[state.name];
    const layer = values[state.layer - 1], row = layer[state.iteration - 1];
    const all = layer.flat().filter((value) => value !== null);
    const [low, high] = limits ?? [Math.min(...all), Math.max(...all)];
    tokens.forEach((token, i) => {
      const found = row[i] === null ? null : colorAt(colors, high > low ? (row[i] - low) / (high - low) : 0.5);
      token.style.backgroundColor = found ? `rgb(${found.map(Math.round)})` : "";
      token.style.color = found ? (isLight(found) ? "#000000" : "#ffffff") : "";
    });
    sliders.forEach(({ show }) => show());
    lowest.textContent = number(low);
    highest.textContent = number(high);
    ramp.style.background = `linear-gradient(90deg, ${colors})`;
    read();
  }

  function read() {
    tokens.forEach((token, i) => token.classList.toggle("chosen", i === state.token));
    if (state.token === null) return;
    const parts = Object.values(data).map(({ title, values }) =>
      `${title.toLowerCase()} ${number(values[state.layer - 1][state.iteration - 1][state.token])}`);
    reading.replaceChildren(make("b", { textContent: `Token ${state.token + 1}, layer ${state.layer}, iteration ${state.iteration}: ` }), parts.join(" · "));
  }

  tokens.forEach((token, i) => {
    token.onpointerenter = token.onclick = () => { state.token = i; read(); };
  });
  color();
}
