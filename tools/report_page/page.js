// What moves on the page: the theme switch and the slice viewer. Plain JavaScript, put into the page as it is.
"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const checked = (name) => [...document.querySelectorAll(`input[name="${name}"]:checked`)].map((input) => input.value);

  function themeSwitch() {
    const choice = byId("theme");
    const apply = () => {
      if (choice.value) document.documentElement.dataset.theme = choice.value;
      else delete document.documentElement.dataset.theme;
    };
    choice.addEventListener("change", apply);
    choice.parentElement.hidden = false;
    apply(); // a reloaded page keeps what was chosen
  }

  // How a plane lies in a volume whose voxels follow each other along x (from the patient's right), y (from the front), z (from the feet).
  function geometry(plane, { shape: [nx, ny, nz], size: [sx, sy, sz] }) {
    const layer = nx * ny;
    return {
      axial: { count: nz, width: nx, height: ny, across: sx, down: sy, right: 1, below: nx, at: (i) => i * layer, first: 2, letters: "RLAP" },
      coronal: { count: ny, width: nx, height: nz, across: sx, down: sz, right: 1, below: -layer, at: (i) => i * nx + (nz - 1) * layer, first: 1, letters: "RLSI" },
      sagittal: { count: nx, width: ny, height: nz, across: sy, down: sz, right: nx, below: -layer, at: (i) => i + (nz - 1) * layer, first: 0, letters: "APSI" },
    }[plane];
  }

  // One slice of a volume, row by row.
  function cut(volume, plane, index) {
    const slice = new Uint8Array(plane.width * plane.height);
    for (let row = 0, to = 0; row < plane.height; row++) {
      let from = plane.at(index) + row * plane.below;
      for (let column = 0; column < plane.width; column++, from += plane.right) slice[to++] = volume[from];
    }
    return slice;
  }

  // A picture with all slices side by side, as one array of gray values.
  async function decode(address, { shape: [nx, ny, nz], across }) {
    const image = new Image();
    image.src = address;
    await image.decode();
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.width, image.height];
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    const pixels = context.getImageData(0, 0, image.width, image.height).data;
    const volume = new Uint8Array(nx * ny * nz);
    let to = 0;
    for (let z = 0; z < nz; z++) {
      const [left, top] = [(z % across) * nx, Math.floor(z / across) * ny];
      for (let y = 0; y < ny; y++) {
        for (let x = 0; x < nx; x++) volume[to++] = pixels[4 * ((top + y) * image.width + left + x)];
      }
    }
    return volume;
  }

  // The edges between pixels of different organs, as a path; a pixel is one unit wide.
  function outline(organ, width, height) {
    const path = new Path2D();
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const here = organ(y * width + x);
        if (x + 1 < width && here !== organ(y * width + x + 1)) { path.moveTo(x + 1, y); path.lineTo(x + 1, y + 1); }
        if (y + 1 < height && here !== organ((y + 1) * width + x)) { path.moveTo(x, y + 1); path.lineTo(x + 1, y + 1); }
      }
    }
    return path;
  }

  function sliceViewer(data) {
    const colours = ["", ...data.colours].map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
    const [missed, extra, confused] = ["#E69F00", "#56B4E9", "#CC79A7"].map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
    const panes = data.columns.map((title) => {
      const figure = document.createElement("figure");
      const canvas = document.createElement("canvas");
      canvas.setAttribute("role", "img");
      const caption = document.createElement("figcaption");
      figure.append(canvas, caption);
      byId("panes").append(figure);
      return { title, figure, canvas, caption };
    });
    let current = null; // the case that is shown: its description, gray values, and label maps by column
    let asked = 0;

    async function load() {
      const ticket = ++asked;
      const chosen = data.cases[Number(byId("case").value)];
      const image = await decode(chosen.image, chosen);
      const maps = await Promise.all(chosen.maps.map((address) => decode(address, chosen)));
      if (ticket !== asked) return; // another case was chosen meanwhile
      for (const map of maps) for (let i = 0; i < map.length; i++) map[i] = Math.round(map[i] / data.stride);
      current = { ...chosen, image, maps };
      turn();
    }

    function turn() {
      const plane = geometry(checked("plane")[0], current);
      byId("slice").max = plane.count - 1;
      byId("slice").value = current.first[plane.first];
      draw();
    }

    function draw() {
      if (!current) return;
      const name = checked("plane")[0];
      const plane = geometry(name, current);
      const index = Number(byId("slice").value);
      const organs = new Set(checked("organ").map(Number));
      const columns = new Set(checked("column").map(Number));
      const errors = checked("mode")[0] === "errors";
      byId("position").value = `${index + 1} of ${plane.count}`;
      byId("errors").hidden = !errors;
      const gray = cut(current.image, plane, index);
      const reference = cut(current.maps[0], plane, index);
      const truth = outline((i) => (organs.has(reference[i]) ? reference[i] : 0), plane.width, plane.height);
      panes.forEach((pane, number) => { pane.figure.hidden = !columns.has(number); }); // all of them first: it makes the others wider
      panes.forEach((pane, number) => {
        if (pane.figure.hidden) return;
        const map = number ? cut(current.maps[number], plane, index) : reference;
        const scores = Object.entries(current.dice[pane.title] ?? {}).filter(([label]) => organs.has(data.labels.indexOf(label) + 1));
        const mean = scores.reduce((sum, [, dice]) => sum + dice, 0) / scores.length;
        const dice = scores.length ? `Dice ${mean.toFixed(3)}` : "";
        pane.caption.replaceChildren(pane.title, Object.assign(document.createElement("small"), { textContent: dice }));
        const seen = data.labels.filter((_, i) => organs.has(i + 1) && map.includes(i + 1));
        pane.canvas.setAttribute("aria-label", `${pane.title}, ${name} slice ${index + 1}: ${seen.join(", ") || "no organ"}. ${dice}`);
        const both = new Set(current.organs[0].filter((organ) => organs.has(organ) && current.organs[number].includes(organ)));
        const colour = (i) => {
          if (!errors || !number) return organs.has(map[i]) ? colours[map[i]] : null;
          const [here, right] = [map[i], reference[i]].map((organ) => (both.has(organ) ? organ : 0));
          return here === right ? null : !here ? missed : !right ? extra : confused;
        };
        paint(pane.canvas, plane, gray, colour, number ? truth : null);
      });
    }

    function paint(canvas, plane, gray, colour, truth) {
      const { width, height } = plane;
      const shown = (canvas.clientWidth || 240) * (window.devicePixelRatio || 1);
      const [across, down] = [shown / width, (shown / width) * (plane.down / plane.across)];
      [canvas.width, canvas.height] = [Math.round(shown), Math.round(down * height)];
      const opacity = Number(byId("opacity").value) / 100;
      const [under, over] = [new ImageData(width, height), new ImageData(width, height)];
      for (let i = 0; i < gray.length; i++) {
        under.data.set([gray[i], gray[i], gray[i], 255], 4 * i);
        const rgb = colour(i);
        if (rgb) over.data.set([...rgb, 255 * opacity], 4 * i);
      }
      const context = canvas.getContext("2d");
      for (const [layer, smooth] of [[under, true], [over, false]]) {
        const small = document.createElement("canvas");
        [small.width, small.height] = [width, height];
        small.getContext("2d").putImageData(layer, 0, 0);
        context.imageSmoothingEnabled = smooth;
        context.imageSmoothingQuality = "high";
        context.drawImage(small, 0, 0, canvas.width, canvas.height);
      }
      const scale = window.devicePixelRatio || 1;
      if (truth) {
        const path = new Path2D();
        path.addPath(truth, new DOMMatrix([across, 0, 0, down, 0, 0]));
        context.strokeStyle = "rgba(255, 255, 255, 0.9)";
        context.lineWidth = 1.2 * scale;
        context.stroke(path);
      }
      context.fillStyle = "#fff";
      [context.shadowColor, context.shadowBlur] = ["#000", 3 * scale];
      context.font = `${11 * scale}px sans-serif`;
      [context.textAlign, context.textBaseline] = ["center", "middle"];
      const [left, right, top, bottom] = plane.letters;
      const edge = 9 * scale;
      context.fillText(left, edge, canvas.height / 2);
      context.fillText(right, canvas.width - edge, canvas.height / 2);
      context.fillText(top, canvas.width / 2, edge);
      context.fillText(bottom, canvas.width / 2, canvas.height - edge);
    }

    byId("no-viewer").hidden = true;
    byId("viewer").hidden = false;
    byId("case").addEventListener("change", load);
    byId("viewer").addEventListener("input", (event) => {
      if (event.target.name === "plane") turn();
      else if (event.target.id !== "case") draw();
    });
    window.addEventListener("resize", draw);
    load();
  }

  themeSwitch();
  const slices = byId("slices-data");
  if (slices) sliceViewer(JSON.parse(slices.textContent));
})();
