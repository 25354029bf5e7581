// The slices of cases in three planes, from voxels that lie in the page; nothing is fetched.
"use strict";
// axis across the slice, axes of the picture's columns and rows, letters at left, right, top, bottom
const PLANES = { axial: [2, 0, 1, "RLAP"], coronal: [1, 0, 2, "RLSI"], sagittal: [0, 1, 2, "APSI"] };

async function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function showSlices(root) {
  const cases = JSON.parse(root.querySelector("script").textContent);
  const find = (selector) => root.querySelector(selector);
  const canvases = [...root.querySelectorAll("canvas")];
  let now, image, truth, prediction, at;

  // columns and rows of a plane run against the axes, as pictures do (RAS+); (i, j) is a pixel
  const placed = ([across, column, row], i, j) => {
    const v = [0, 0, 0];
    v[across] = at[across];
    v[column] = now.size[column] - 1 - i;
    v[row] = now.size[row] - 1 - j;
    return v;
  };
  const offset = ([x, y, z]) => (x * now.size[1] + y) * now.size[2] + z;

  function outline(labels, width, height, own) { // edges between pixels of a class and others
    const path = new Path2D(), is = (i, j) =>
      i >= 0 && j >= 0 && i < width && j < height && own.includes(labels[j * width + i]);
    for (let j = 0; j <= height; j++) {
      for (let i = 0; i <= width; i++) {
        if (is(i, j) !== is(i - 1, j)) { path.moveTo(i, j); path.lineTo(i, j + 1); }
        if (is(i, j) !== is(i, j - 1)) { path.moveTo(i, j); path.lineTo(i + 1, j); }
      }
    }
    return path;
  }

  function fitted(canvas, plane) { // pixels of the screen: place and scale of the slice, to scale in mm
    const side = Math.max(Math.round(canvas.clientWidth * devicePixelRatio), 1);
    const [, column, row] = plane, mm = now.mm.map((x, a) => x * now.size[a]);
    const scale = side / Math.max(mm[column], mm[row]);
    const [w, h] = [mm[column] * scale, mm[row] * scale];
    return { side, left: (side - w) / 2, top: (side - h) / 2, w, h };
  }

  function draw(canvas) {
    const plane = PLANES[canvas.dataset.plane], [across, column, row, letters] = plane;
    const [width, height] = [now.size[column], now.size[row]];
    const pixels = new ImageData(width, height), found = new Uint8Array(width * height);
    const [filled, outlined] = [truth && find(".truth").checked, find(".prediction").checked];
    for (let j = 0, n = 0; j < height; j++) {
      for (let i = 0; i < width; i++, n++) {
        const o = offset(placed(plane, i, j)), k = filled ? truth[o] : 0, color = now.colors[k];
        for (let c = 0; c < 3; c++) {
          pixels.data[4 * n + c] = k ? 0.55 * image[o] + 0.45 * color[c] : image[o];
        }
        pixels.data[4 * n + 3] = 255;
        if (outlined) found[n] = prediction[o];
      }
    }
    const slice = new OffscreenCanvas(width, height), { side, left, top, w, h } = fitted(canvas, plane);
    slice.getContext("2d").putImageData(pixels, 0, 0);
    canvas.width = canvas.height = side;
    const g = canvas.getContext("2d");
    g.drawImage(slice, left, top, w, h);
    for (const { color, indices } of now.classes) {
      const path = new Path2D();
      path.addPath(outline(found, width, height, indices),
        new DOMMatrix([w / width, 0, 0, h / height, left, top]));
      g.lineWidth = 1.6 * devicePixelRatio;
      g.strokeStyle = `rgb(${color})`;
      g.stroke(path);
    }
    g.strokeStyle = "rgba(255, 255, 255, .25)"; // where the other two planes are
    g.lineWidth = 1;
    const x = left + (width - at[column] - 0.5) * w / width, y = top + (height - at[row] - 0.5) * h / height;
    g.strokeRect(x, -1, 0, side + 2);
    g.strokeRect(-1, y, side + 2, 0);
    g.font = `${12 * devicePixelRatio}px sans-serif`;
    g.fillStyle = "#f0e442";
    g.textAlign = "center";
    g.textBaseline = "middle";
    const rim = 9 * devicePixelRatio;
    g.lineWidth = 2 * devicePixelRatio;
    g.strokeStyle = "black";
    [[rim, side / 2], [side - rim, side / 2], [side / 2, rim], [side / 2, side - rim]]
      .forEach((place, n) => {
        g.strokeText(letters[n], ...place);
        g.fillText(letters[n], ...place);
      });
    const slider = find(`input[data-plane=${canvas.dataset.plane}]`);
    slider.max = now.size[across] - 1;
    slider.value = at[across];
    slider.nextElementSibling.value = `${at[across] + 1} of ${now.size[across]}`;
  }

  const drawAll = () => image && canvases.forEach(draw);

  function go(axis, index) { // returns whether the slice is another one
    const before = at[axis];
    at[axis] = Math.min(Math.max(index, 0), now.size[axis] - 1);
    if (at[axis] !== before) drawAll();
    return at[axis] !== before;
  }

  function choose(entry) {
    at = [...entry.at];
    root.querySelectorAll(".classes button")
      .forEach((button, n) => button.setAttribute("aria-pressed", now.classes[n] === entry));
    drawAll();
  }

  async function open(n) {
    const chosen = cases[n], voxels = await unpacked(chosen.voxels);
    const count = chosen.size.reduce((a, b) => a * b);
    if (find(".case").selectedIndex !== n) return; // another one was chosen meanwhile
    now = chosen;
    image = voxels.subarray(0, count);
    prediction = voxels.subarray(count, 2 * count);
    truth = now.has_truth && voxels.subarray(2 * count);
    find(".truth").parentElement.hidden = !truth;
    find(".note").textContent = now.note;
    find(".classes").replaceChildren(...now.classes.map((entry) => {
      const button = document.createElement("button"), mark = document.createElement("i");
      mark.style.background = `rgb(${entry.color})`;
      button.append(mark, entry.text);
      button.onclick = () => choose(entry);
      return button;
    }));
    choose(now.classes[0] || { at: now.size.map((n) => n >> 1) });
  }

  for (const canvas of canvases) {
    const plane = PLANES[canvas.dataset.plane], [axis, column, row] = plane;
    canvas.onwheel = (event) => { // at the first and last slice the page scrolls on
      if (image && go(axis, at[axis] - Math.sign(event.deltaY))) event.preventDefault();
    };
    canvas.onclick = (event) => {
      const { side, left, top, w, h } = fitted(canvas, plane), scale = side / canvas.clientWidth;
      const i = Math.floor((event.offsetX * scale - left) / w * now.size[column]);
      const j = Math.floor((event.offsetY * scale - top) / h * now.size[row]);
      go(column, now.size[column] - 1 - i);
      go(row, now.size[row] - 1 - j);
    };
    canvas.onkeydown = (event) => {
      const last = now.size[axis] - 1, steps = { ArrowUp: at[axis] + 1, ArrowRight: at[axis] + 1,
        ArrowDown: at[axis] - 1, ArrowLeft: at[axis] - 1, PageUp: at[axis] + 10,
        PageDown: at[axis] - 10, Home: 0, End: last };
      if (event.key in steps) { event.preventDefault(); go(axis, steps[event.key]); }
    };
    find(`input[data-plane=${canvas.dataset.plane}]`).oninput = (event) => go(axis, +event.target.value);
  }
  find(".truth").onchange = find(".prediction").onchange = drawAll;
  find(".case").replaceChildren(...cases.map((one) => new Option(one.title)));
  find(".case").onchange = (event) => open(event.target.selectedIndex);
  new ResizeObserver(drawAll).observe(root);
  root.hidden = false;
  open(0);
}

if ("DecompressionStream" in window) document.querySelectorAll(".slices").forEach(showSlices);
