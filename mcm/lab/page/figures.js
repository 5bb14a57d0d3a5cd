// Drawing. A plot maps numbers to an SVG; handles are dots that can be dragged and have keys.
const NS = "http://www.w3.org/2000/svg";
function add(parent, tag, attributes, text) {
  const node = document.createElementNS(NS, tag);
  for (const [k, v] of Object.entries(attributes)) node.setAttribute(k, v);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}
function plot(svg, [left, top, width, height], [x0, x1], [y0, y1], labels) {
  const g = add(svg, "g", {});
  const X = x => left + width * (x - x0) / (x1 - x0), Y = y => top + height * (y1 - y) / (y1 - y0);
  const axis = {stroke: "var(--line)", fill: "none"};
  const me = {
    X, Y, ux: px => x0 + (x1 - x0) * (px - left) / width,
    uy: py => y1 - (y1 - y0) * (py - top) / height,
    clear() { g.replaceChildren(); this.frame(); },
    frame() {
      add(g, "rect", {x: left, y: top, width, height, ...axis});
      for (const [v, at] of [[x0, 0], [(x0 + x1) / 2, 0.5], [x1, 1]])
        add(g, "text", {x: left + at * width, y: top + height + 16, "text-anchor": "middle",
          class: "faint"}, +v.toFixed(2));
      for (const v of [y0, (y0 + y1) / 2, y1])
        add(g, "text", {x: left - 5, y: Y(v) + 4, "text-anchor": "end", class: "faint"}, +v.toFixed(2));
      add(g, "text", {x: left + width / 2, y: top + height + 32, "text-anchor": "middle"}, labels[0]);
      add(g, "text", {x: left, y: top - 6}, labels[1]);
    },
    line(points, color, more = {}) {
      const inside = points.filter(p => p.every(Number.isFinite));
      const limit = y => Math.min(Math.max(y, y0 - (y1 - y0)), y1 + (y1 - y0));
      return add(g, "polyline", {points: inside.map(([x, y]) => `${X(x)},${Y(limit(y))}`).join(" "),
        fill: "none", stroke: `var(--${color})`, "stroke-width": 2, "clip-path": `inset(0)`, ...more});
    },
    box(xa, xb, ya, yb, fill, more = {}) {
      return add(g, "rect", {x: X(Math.min(xa, xb)), y: Y(Math.max(ya, yb)),
        width: Math.abs(X(xb) - X(xa)), height: Math.abs(Y(yb) - Y(ya)), fill, ...more});
    },
    text(x, y, text, color = "ink") {
      add(g, "text", {x: X(x), y: Y(y), style: `fill: var(--${color})`}, text);
    },
  };
  me.frame();
  return me;
}
// A line to drag a handle along, or to press where it should go, for what has no place in a plot.
function track(svg, [left, top, width], [x0, x1], label) {
  const ends = {x1: left, x2: left + width, y1: top, y2: top};
  add(svg, "line", {...ends, stroke: "var(--faint)"});
  add(svg, "text", {x: left + width + 14, y: top + 5}, label);
  return {rail: add(svg, "line", {...ends, class: "rail"}), place: v => [left + width * (v - x0) / (x1 - x0), top], read: px => x0 + (x1 - x0) * (px - left) / width};
}
// place(value) -> [px, py] in the SVG; read(px, py) -> value; say(value): what a screen reader says
function handle(svg, name, {min, max, step, value, place, read, rail, say}, changed) {
  const dot = add(svg, "circle", {r: 9, class: "handle", tabindex: 0, role: "slider",
    "aria-label": name, "aria-valuemin": min, "aria-valuemax": max});
  const me = {value, set(v) {
    me.value = Math.min(max(me), Math.max(min(me), Math.round(v / step) * step));
    changed();
  }, show() {
    const [x, y] = place(me.value);
    dot.setAttribute("cx", x); dot.setAttribute("cy", y);
    dot.setAttribute("aria-valuenow", +me.value.toFixed(4));
    dot.setAttribute("aria-valuemin", min(me)); dot.setAttribute("aria-valuemax", max(me));
    if (say) dot.setAttribute("aria-valuetext", say(me.value));
  }};
  const move = event => {
    const p = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    me.set(read(p.x, p.y));
  };
  const hold = event => {
    dot.setPointerCapture(event.pointerId); dot.focus(); event.preventDefault();
    dot.onpointermove = move;
    dot.onpointerup = dot.onpointercancel = () => { dot.onpointermove = null; };
  };
  dot.addEventListener("pointerdown", hold);
  if (rail) rail.addEventListener("pointerdown", event => { hold(event); move(event); });
  for (const node of rail ? [dot, rail] : [dot])  // a finger here drags, and does not scroll
    node.addEventListener("touchstart", event => event.preventDefault(), {passive: false});
  dot.addEventListener("keydown", event => {
    const by = {ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 10, PageDown: -10};
    if (event.key === "Home") me.set(min(me));
    else if (event.key === "End") me.set(max(me));
    else if (by[event.key]) me.set(me.value + by[event.key] * step);
    else return;
    event.preventDefault(); dot.focus();
  });
  return me;
}
const constant = v => () => v;
function figure(id, make) {
  const section = document.getElementById(id), svg = section.querySelector("svg");
  const say = text => { section.querySelector("output").textContent = text; };
  const control = name => section.querySelector(`[data-name=${name}]`);
  const draw = make(svg, say, control, () => draw());
  for (const input of section.querySelectorAll("select, input")) input.onchange = () => draw();
  draw();
}
const range = (a, b, n) => Array.from({length: n}, (_, i) => a + (b - a) * i / (n - 1));
