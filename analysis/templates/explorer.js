"use strict";
// The explorer: decodes the stored attention of a picture, and draws what a query reads, what reads a place, or the
// keys of all queries. Places are pixels of the model's input, (y, x); q counts queries in reading order.
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const QUERY = "#00e5ff";
  // Okabe and Ito's colours, in an order whose neighbours differ most on a dark picture.
  const GROUPS = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2", "#FFFFFF"];
  // matplotlib's inferno from 15 % on, at equal steps: even in lightness, so safe for colour-blind readers.
  const STOPS = ["2b0b57", "550f6d", "7d1e6d", "a52c60", "cb4149", "e9612b", "f98c0a", "fac228", "fcffa4"];
  const COLOURS = Array.from({ length: 256 }, (_, i) => {
    const place = (i / 255) * (STOPS.length - 1);
    const first = Math.min(Math.floor(place), STOPS.length - 2);
    const [a, b] = [first, first + 1].map((k) => [0, 2, 4].map((c) => parseInt(STOPS[k].slice(c, c + 2), 16)));
    return a.map((value, c) => Math.round(value + (place - first) * (b[c] - value)));
  });
  const colour = (share, alpha = 1) => `rgba(${COLOURS[Math.round(255 * Math.min(1, Math.max(0, share)))].join()},${alpha})`;

  const state = { picture: 0, mode: "reads", share: 50, y: page.query[0], x: page.query[1] };
  const layers = { offsets: true, grid: false, gradient: false, seen: false, stage: false };
  const views = [];

  // --- Store -------------------------------------------------------------------------------------

  async function inflate(id) {
    const text = atob(document.getElementById(`blob-${id}`).textContent.trim());
    const packed = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).arrayBuffer();
  }

  // A block of the store with its arrays: `weight(part, q, s)`, places as Float32Array of y, x, y, x, …
  class Block {
    constructor(description, content) {
      Object.assign(this, description);
      [this.partCount, this.queries, this.keys] = this.shape;
      this.bytes = new Uint8Array(content, this.weights, this.partCount * this.queries * this.keys);
      this.maxima = new Float32Array(content.slice(this.largest, this.largest + 4 * this.partCount * this.queries));
      if (this.layout === "cells") {
        this.rowLength = Math.max(...this.columns);
      } else {
        const perQuery = this.layout === "taps" ? this.queries : 1;
        this.places = this.decode(content, this.points, 2 * this.groups * perQuery * this.keys);
        this.origins = this.decode(content, this.reference, 2 * perQuery * this.keys);
      }
      this.cache = new Map();
    }
    decode(content, { start, low, step }, length) {
      const numbers = new Uint16Array(content.slice(start, start + 2 * length));
      return Float32Array.from(numbers, (n) => low + step * n);
    }
    weight(part, q, s) {
      const row = part * this.queries + q;
      const root = this.bytes[row * this.keys + s] / 255;
      return root * root * this.maxima[row];
    }
    // The weight of key s, of one part or the mean of several.
    mean(parts, q, s) {
      let sum = 0;
      for (const part of parts) sum += this.weight(part, q, s);
      return sum / parts.length;
    }
    // The parts that are averaged for a chosen part, by offset group: [[group, parts], …].
    byGroup(chosen) {
      const all = [...Array(this.partCount).keys()];
      if (this.layout === "cells") return [[0, chosen === null ? all : [chosen]]];
      const per = this.partCount / this.groups;
      if (chosen !== null) return [[Math.floor(chosen / per), [chosen]]];
      return [...Array(this.groups).keys()].map((g) => [g, all.slice(g * per, (g + 1) * per)]);
    }
    queryAt(y, x) {
      const row = Math.min(this.map[0] - 1, Math.max(0, Math.floor(y / this.cell)));
      const column = Math.min(this.map[1] - 1, Math.max(0, Math.floor(x / this.cell)));
      return row * this.map[1] + column;
    }
    cellOf(q) {
      return [Math.floor(q / this.map[1]), q % this.map[1]];
    }
    // The key of query q at cell (row, column) of the key map: its entry, or -1.
    entryOf(q, row, column) {
      const [y, x] = this.cellOf(q);
      const [i, j] = [row - this.firstRow[y], column - this.firstColumn[x]];
      return i >= 0 && j >= 0 && i < this.rows[y] && j < this.columns[x] ? i * this.rowLength + j : -1;
    }
    place(group, q, s, places = this.places) {
      const index = (this.layout === "taps" ? (group * this.queries + q) * this.keys : group * this.keys) + s;
      return [places[2 * index], places[2 * index + 1]];
    }
    origin(q, s) {
      const index = (this.layout === "taps" ? q * this.keys : 0) + s;
      return [this.origins[2 * index], this.origins[2 * index + 1]];
    }

    // What query q reads: keys {y, x, w, …}, the strongest first.
    reads(q, chosen) {
      const keys = [];
      for (const [group, parts] of this.byGroup(chosen)) {
        if (this.layout === "cells") {
          const [y, x] = this.cellOf(q);
          for (let i = 0; i < this.rows[y]; i++) {
            for (let j = 0; j < this.columns[x]; j++) {
              keys.push(this.cellKey(this.firstRow[y] + i, this.firstColumn[x] + j, this.mean(parts, q, i * this.rowLength + j)));
            }
          }
        } else {
          for (let s = 0; s < this.keys; s++) keys.push(this.pointKey(group, q, s, this.mean(parts, q, s)));
        }
      }
      return keys.sort((a, b) => b.w - a.w);
    }
    cellKey(row, column, w) {
      return this.mapKey(row * this.keyMap[1] + column, w);
    }
    // Cell number `k` of the key map, or of the map where keys have places of their own.
    mapKey(k, w) {
      const [, width] = this.keyMap ?? this.map;
      const [height, length] = this.keyCell ?? [this.cell, this.cell];
      const [row, column] = [Math.floor(k / width), k % width];
      return { row, column, y: (row + 0.5) * height, x: (column + 0.5) * length, w };
    }
    pointKey(group, q, s, w) {
      const [[y, x], [fromY, fromX]] = [this.place(group, q, s), this.origin(q, s)];
      return { group, s, y, x, fromY, fromX, w };
    }

    // The key nearest to (y, x): what `readers` asks about.
    nearest(y, x, chosen) {
      if (this.layout === "cells") {
        const limit = (value, count) => Math.min(count - 1, Math.max(0, Math.floor(value)));
        const key = this.cellKey(limit(y / this.keyCell[0], this.keyMap[0]), limit(x / this.keyCell[1], this.keyMap[1]), 0);
        return { ...key, text: `cell ${key.row + 1}, ${key.column + 1} of the keys` };
      }
      if (this.layout === "taps") return { y, x, text: "taps within a cell of this place" };
      let best = null;
      for (const [group] of this.byGroup(chosen)) {
        for (let s = 0; s < this.keys; s++) {
          const [py, px] = this.place(group, 0, s);
          const distance = (py - y) ** 2 + (px - x) ** 2;
          if (best === null || distance < best.distance) best = { distance, group, s };
        }
      }
      return { ...this.pointKey(best.group, 0, best.s, 0), text: `the nearest sampled point${this.groups > 1 ? `, of group ${best.group + 1}` : ""}` };
    }
    // The weight that every query gives to `key`, Float32Array (N).
    readers(key, chosen) {
      const weights = new Float32Array(this.queries);
      const groups = this.byGroup(chosen);
      for (let q = 0; q < this.queries; q++) {
        if (this.layout === "cells") {
          const entry = this.entryOf(q, key.row, key.column);
          if (entry >= 0) weights[q] = this.mean(groups[0][1], q, entry);
        } else if (this.layout === "points") {
          weights[q] = this.mean(groups.find(([group]) => group === key.group)[1], q, key.s);
        } else {
          for (const [group, parts] of groups) {
            for (let s = 0; s < this.keys; s++) {
              const [y, x] = this.place(group, q, s);
              const share = Math.max(0, 1 - Math.abs(y - key.y) / this.cell) * Math.max(0, 1 - Math.abs(x - key.x) / this.cell);
              if (share) weights[q] += (share * this.mean(parts, q, s)) / groups.length;
            }
          }
        }
      }
      return weights;
    }

    // Every key with its weight averaged over all queries, the strongest first.
    overall(chosen) {
      if (this.cache.has(chosen)) return this.cache.get(chosen);
      const keys = [];
      let sums; // by cell, where the keys are no points of the block
      for (const [group, parts] of this.byGroup(chosen)) {
        if (this.layout === "points") {
          for (let s = 0; s < this.keys; s++) {
            let sum = 0;
            for (let q = 0; q < this.queries; q++) sum += this.mean(parts, q, s);
            keys.push(this.pointKey(group, 0, s, sum / this.queries));
          }
          continue;
        }
        const [height, width] = this.layout === "cells" ? this.keyMap : this.map;
        sums ??= new Float32Array(height * width);
        for (let q = 0; q < this.queries; q++) {
          const [y, x] = this.cellOf(q);
          if (this.layout === "cells") {
            for (let i = 0; i < this.rows[y]; i++) {
              for (let j = 0; j < this.columns[x]; j++) {
                sums[(this.firstRow[y] + i) * width + this.firstColumn[x] + j] += this.mean(parts, q, i * this.rowLength + j);
              }
            }
          } else {
            for (let s = 0; s < this.keys; s++) {
              const [py, px] = this.place(group, q, s);
              const [row, column] = [Math.floor(py / this.cell), Math.floor(px / this.cell)];
              const groups = chosen === null ? this.groups : 1;
              if (row >= 0 && column >= 0 && row < height && column < width) sums[row * width + column] += this.mean(parts, q, s) / groups;
            }
          }
        }
      }
      sums?.forEach((sum, k) => keys.push(this.mapKey(k, sum / this.queries)));
      keys.sort((a, b) => b.w - a.w);
      this.cache.set(chosen, keys);
      return keys;
    }
  }

  // The first keys that together hold `share` per cent of the weight.
  function holding(keys, share) {
    const total = keys.reduce((sum, key) => sum + key.w, 0);
    let held = 0;
    let count = 0;
    while (count < keys.length && held < (total * share) / 100 - 1e-9) held += keys[count++].w;
    return keys.slice(0, Math.max(1, count));
  }

  const percent = (w) => `${w >= 0.1 ? (100 * w).toFixed(1) : w >= 0.001 ? (100 * w).toFixed(2) : (100 * w).toPrecision(2)} %`;
  const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
  const offsetWords = (key) => {
    const [down, right] = [Math.round(key.y - key.fromY), Math.round(key.x - key.fromX)];
    if (!down && !right) return "none";
    const words = [];
    if (right) words.push(`${Math.abs(right)} ${right > 0 ? "right" : "left"}`);
    if (down) words.push(`${Math.abs(down)} ${down > 0 ? "down" : "up"}`);
    return words.join(", ");
  };

  // --- View: a model and its panels --------------------------------------------------------------

  class View {
    constructor(element, model) {
      this.element = element;
      this.model = model;
      this.chosen = new Map(); // block name → part, or null
      this.gradientOf = 0;
      this.find = (selector) => element.querySelector(selector);
      this.canvas = this.find(".large");
      this.selected = null;
    }

    async open(index) {
      this.picture = this.model.pictures[index];
      const content = await inflate(this.picture.blob);
      [this.shown, this.seen] = await Promise.all([this.picture.shown, this.picture.seen].map(load));
      this.grey = new Map();
      this.blocks = this.picture.blocks.map((description) => new Block(description, content));
      const names = this.blocks.map((block) => block.name);
      if (!names.includes(this.selected)) {
        const best = this.blocks.findLast((b) => b.letter === "D" && b.map[0] * b.map[1] > 60) ?? this.blocks.findLast((b) => b.letter === "D");
        this.selected = (best ?? this.blocks.at(-1)).name;
      }
      this.buildPanels();
      this.buildPredictions();
    }

    get block() {
      return this.blocks.find((block) => block.name === this.selected);
    }
    part(block) {
      return this.chosen.get(block.name) ?? null;
    }
    // The query in pixels of this model's input.
    get place() {
      return [state.y * this.picture.size[0], state.x * this.picture.size[1]];
    }

    buildPanels() {
      const stages = new Map();
      for (const block of this.blocks) stages.set(block.stage, [...(stages.get(block.stage) ?? []), block]);
      const sections = [...stages].map(([stage, blocks]) => {
        const section = make("section", { className: "stage" });
        const title = make("h3", { textContent: `Stage ${stage + 1}` });
        const [block] = blocks;
        title.append(make("span", { textContent: `${block.map.join("×")} cells of ${block.cell} px, ${plural(block.heads, "head")}` }));
        const panels = make("div", { className: "panels" });
        for (const one of blocks) {
          const panel = make("button", { className: "panel", type: "button" });
          panel.dataset.block = one.name;
          panel.append(make("canvas", { width: 320, height: 320 }), make("b", { textContent: `${one.name} ${page.kinds[one.letter]}` }), make("span", {}));
          panel.addEventListener("click", () => select(one.name));
          one.panel = panel;
          panels.append(panel);
        }
        section.append(title, panels);
        return section;
      });
      this.find(".blocks").replaceChildren(...sections);
    }

    buildPredictions() {
      const items = this.picture.predictions.map((prediction, index) => {
        const item = make("li", {});
        const button = make("button", { type: "button", textContent: prediction.name, title: `${prediction.name}: show its class gradient` });
        button.addEventListener("click", () => {
          this.gradientOf = index;
          setLayer("gradient", true);
        });
        const bar = make("div", { className: "bar" });
        const fill = make("span", {});
        fill.style.width = `${100 * prediction.p}%`;
        bar.append(fill);
        item.append(bar, button, make("output", { textContent: percent(prediction.p) }));
        return item;
      });
      this.find(".predictions ul").replaceChildren(...items);
    }

    // The name of the block after or before the selected one, or of the first of the next stage.
    neighbour(delta, byStage) {
      const index = this.blocks.indexOf(this.block);
      let next = index + delta;
      if (byStage) {
        const stage = this.block.stage + delta;
        next = delta > 0 ? this.blocks.findIndex((b) => b.stage === stage) : this.blocks.findLastIndex((b) => b.stage === stage);
      }
      return this.blocks[next]?.name ?? this.selected;
    }

    // What is drawn for a block: keys or a map of queries.
    reading(block) {
      const chosen = this.part(block);
      const [y, x] = this.place;
      if (state.mode === "reads") {
        const q = block.queryAt(y, x);
        const all = block.reads(q, chosen);
        return { q, all, keys: holding(all, state.share) };
      }
      if (state.mode === "overall") {
        const all = layers.stage && block.layout === "points" ? this.overallOfStage(block) : block.overall(chosen);
        return { all, keys: holding(all, state.share) };
      }
      const key = block.nearest(y, x, chosen);
      const weights = block.readers(key, chosen);
      const all = Array.from(weights, (w, q) => {
        const [row, column] = block.cellOf(q);
        return { row, column, y: (row + 0.5) * block.cell, x: (column + 0.5) * block.cell, w };
      }).sort((a, b) => b.w - a.w);
      return { key, all, keys: holding(all, state.share) };
    }
    overallOfStage(block) {
      const all = this.blocks.filter((b) => b.stage === block.stage && b.layout === "points");
      return all.flatMap((b) => b.overall(this.part(b))).sort((a, b) => b.w - a.w);
    }

    draw() {
      for (const block of this.blocks) {
        const reading = this.reading(block);
        const canvas = block.panel.querySelector("canvas");
        this.paint(canvas, block, reading, 1);
        const [strongest] = reading.all;
        block.panel.setAttribute("aria-pressed", String(block.name === this.selected));
        block.panel.querySelector("span").textContent = `max ${percent(strongest.w)}, ${reading.keys.length} of ${reading.all.length}`;
        if (block.name === this.selected) this.drawSelected(block, reading);
      }
    }

    drawSelected(block, reading) {
      const ratio = Math.min(3, window.devicePixelRatio || 1);
      const side = Math.round(448 * Math.max(1, ratio));
      if (this.canvas.width !== side) this.canvas.width = this.canvas.height = side;
      this.paint(this.canvas, block, reading, side / 448);
      this.reading_ = reading;
      const { size } = this.picture;
      const [y, x] = this.place.map(Math.round);
      const part = this.part(block);
      const which = part === null ? (block.partCount > 1 || block.heads > 1 ? (block.groups > 1 ? "all offset groups" : "mean of the heads") : "one head") : `${block.parts} ${part + 1}`;
      this.find(".block-title").textContent = `Block ${block.name}: ${page.kinds[block.letter]}, ${which}`;
      const [strongest] = reading.all;
      const noun = strongest.row === undefined ? "point" : "cell";
      const many = (n) => (state.mode === "readers" ? `${n.toLocaleString("en")} ${n === 1 ? "query" : "queries"}` : plural(n, noun));
      const half = holding(reading.all, 50).length;
      const texts = {
        reads: () => `Query at y ${y}, x ${x} of ${size[0]}×${size[1]} px. Strongest ${noun} ${percent(strongest.w)}; ${many(half)} of ${reading.all.length.toLocaleString("en")} hold half of the weight.`,
        readers: () => `Place y ${y}, x ${x}: ${reading.key.text}. The query that reads it most gives it ${percent(strongest.w)}; ${many(half)} of ${reading.all.length.toLocaleString("en")} give half of all it gets.`,
        overall: () => `Average over all ${block.queries.toLocaleString("en")} queries. Strongest ${noun} ${percent(strongest.w)}; ${many(half)} of ${reading.all.length.toLocaleString("en")} hold half of the weight.`,
      };
      let text = texts[state.mode]();
      if (block.elsewhere) text += ` Up to ${percent(block.elsewhere)} of a query’s weight is on the class token, which has no place.`;
      this.find(".readout").textContent = text;
      this.find(".scale-end").textContent = `${percent(strongest.w)}, the largest here`;
      this.buildParts(block, part);
      this.buildFacts(block);
      this.buildKeys(block, reading);
      for (const [index, item] of [...this.find(".predictions ul").children].entries()) {
        item.querySelector("button").setAttribute("aria-pressed", String(layers.gradient && index === this.gradientOf));
      }
    }

    buildParts(block, part) {
      const box = this.find(".parts");
      if (block.partCount === 1) {
        box.replaceChildren(make("span", { className: "quiet", textContent: block.heads > 1 ? `${block.heads} heads, averaged` : "one head" }));
        return;
      }
      const choices = [null, ...Array(block.partCount).keys()].map((index) => {
        const button = make("button", { type: "button", textContent: index === null ? `all ${block.parts}s` : `${index + 1}` });
        if (index !== null && block.layout !== "cells") {
          const dot = make("span", { className: "dot" });
          dot.style.background = GROUPS[Math.floor(index / (block.partCount / block.groups)) % GROUPS.length];
          button.prepend(dot);
        }
        button.setAttribute("aria-label", index === null ? `all ${block.parts}s` : `${block.parts} ${index + 1}`);
        button.setAttribute("aria-pressed", String(index === part));
        button.addEventListener("click", () => {
          this.chosen.set(block.name, index);
          redraw();
        });
        return button;
      });
      box.replaceChildren(...choices);
    }

    buildFacts(block) {
      const facts = [];
      if (block.health) {
        facts.push(["mean offset", `${block.health.offset.toFixed(1)} px`]);
        facts.push([block.clamped ? "clamped to the border" : "outside of the map", percent(block.health.outside)]);
        facts.push(["cells that a point touches", percent(block.health.coverage)]);
        if (block.groups > 1) facts.push(["distance between groups", `${block.health.distance.toFixed(1)} px`]);
      }
      const nodes = facts.map(([name, value]) => {
        const box = make("div", {});
        box.append(make("dt", { textContent: name }), make("dd", { textContent: value }));
        return box;
      });
      this.find(".facts").replaceChildren(...nodes);
    }

    buildKeys(block, reading) {
      const readers = state.mode === "readers";
      const points = !readers && block.layout !== "cells" && reading.all[0].fromY !== undefined;
      this.find(".keys-title").textContent = readers ? "Queries that read it most" : "Strongest keys";
      this.find(".keys-more").textContent = points ? "offset in px" : "";
      const rows = reading.all.slice(0, 5).map((key) => {
        const row = make("tr", {});
        row.dataset.weight = key.w;
        row.append(make("td", { className: "right", textContent: percent(key.w) }));
        row.append(make("td", { className: "right", textContent: `${Math.round(key.y)}, ${Math.round(key.x)}` }));
        row.append(make("td", { textContent: points ? offsetWords(key) : "" }));
        return row;
      });
      this.find(".keys").replaceChildren(...rows);
    }

    // Draw a block on a square canvas; `zoom` enlarges lines and points.
    paint(canvas, block, reading, zoom) {
      const context = canvas.getContext("2d");
      const [height, width] = this.picture.size;
      const [sy, sx] = [canvas.height / height, canvas.width / width];
      const large = canvas === this.canvas;
      const unit = large ? zoom : canvas.width / 448;
      context.setTransform(1, 0, 0, 1, 0, 0);
      const asCells = reading.all[0].row !== undefined;
      this.paintPicture(context, canvas, asCells);
      const strongest = reading.all[0].w || 1;
      if (asCells) {
        const cell = state.mode !== "readers" && block.keyCell ? block.keyCell : [block.cell, block.cell];
        for (const key of reading.keys) {
          if (key.w <= 0) continue;
          context.fillStyle = colour(key.w / strongest, layers.gradient ? 0.55 : state.mode === "reads" ? 0.75 : 0.68);
          context.fillRect(key.column * cell[1] * sx, key.row * cell[0] * sy, Math.ceil(cell[1] * sx), Math.ceil(cell[0] * sy));
        }
        if (state.mode === "reads") this.paintFrame(context, block, reading.q, cell, sy, sx, unit);
        if (state.mode === "readers" && large && block.layout === "cells") {
          context.strokeStyle = "#fff";
          context.lineWidth = 2 * unit;
          const [h, w] = block.keyCell;
          context.strokeRect(reading.key.column * w * sx, reading.key.row * h * sy, w * sx, h * sy);
        }
      } else {
        this.paintPoints(context, block, reading, strongest, sy, sx, unit);
      }
      if (layers.grid && block.origins) this.paintGrid(context, block, reading.q ?? 0, sy, sx, unit);
      if (state.mode === "readers" && reading.key) mark(context, reading.key.x * sx, reading.key.y * sy, 7 * unit, "#fff");
      if (state.mode === "reads") {
        const [row, column] = block.cellOf(reading.q);
        context.strokeStyle = QUERY;
        context.lineWidth = 2 * unit;
        context.strokeRect(column * block.cell * sx, row * block.cell * sy, block.cell * sx, block.cell * sy);
        star(context, state.x * canvas.width, state.y * canvas.height, 10 * unit);
      }
    }

    paintPicture(context, canvas, grey) {
      const image = layers.seen ? this.seen : this.shown;
      context.imageSmoothingEnabled = !layers.seen;
      context.filter = grey ? "grayscale(1) brightness(0.62)" : "brightness(0.62)";
      context.drawImage(image, 0, 0, canvas.width, canvas.height);
      context.filter = "none";
      if (!layers.gradient) return;
      const { gradient } = this.picture.predictions[this.gradientOf] ?? {};
      if (!gradient) return;
      const [rows, columns] = [gradient.length, gradient[0].length];
      const small = make("canvas", { width: columns, height: rows });
      const pixels = small.getContext("2d").createImageData(columns, rows);
      gradient.flat().forEach((value, k) => pixels.data.set([0, 114, 178].map((c) => c + (255 - c) * value * value).concat(Math.round(215 * value)), 4 * k));
      small.getContext("2d").putImageData(pixels, 0, 0);
      context.imageSmoothingEnabled = true;
      context.imageSmoothingQuality = "high";
      context.drawImage(small, 0, 0, canvas.width, canvas.height);
    }

    paintFrame(context, block, q, cell, sy, sx, unit) {
      if (block.layout !== "cells") return;
      const [y, x] = block.cellOf(q);
      context.strokeStyle = "#ffffffcc";
      context.lineWidth = 1.25 * unit;
      context.strokeRect(block.firstColumn[x] * cell[1] * sx, block.firstRow[y] * cell[0] * sy, block.columns[x] * cell[1] * sx, block.rows[y] * cell[0] * sy);
    }

    paintPoints(context, block, reading, strongest, sy, sx, unit) {
      const shownKeys = reading.keys.slice().reverse(); // the strongest on top
      const groups = new Set(reading.all.map((key) => key.group)).size;
      if (layers.offsets) {
        const thin = Math.min(1, 6 / Math.sqrt(shownKeys.length)); // many lines would hide the picture
        for (const key of shownKeys) {
          const tint = groups > 1 ? GROUPS[key.group % GROUPS.length] : "#ffffff";
          context.globalAlpha = Math.max(0.12, thin * (0.3 + 0.6 * Math.sqrt(key.w / strongest)));
          arrow(context, key.fromX * sx, key.fromY * sy, key.x * sx, key.y * sy, tint, unit * Math.max(0.65, thin));
        }
        context.globalAlpha = 1;
      }
      const largest = Math.min(11, 170 / Math.sqrt(reading.all.length)) * unit;
      for (const key of shownKeys) {
        const share = key.w / strongest;
        context.beginPath();
        context.arc(key.x * sx, key.y * sy, Math.max(1.2 * unit, largest * Math.sqrt(share)), 0, 2 * Math.PI);
        context.fillStyle = colour(share, 0.95);
        context.fill();
        context.lineWidth = (0.6 + 0.9 * share) * unit;
        context.strokeStyle = groups > 1 ? GROUPS[key.group % GROUPS.length] : "#ffffffdd";
        context.stroke();
      }
    }

    paintGrid(context, block, q, sy, sx, unit) {
      context.strokeStyle = "#ffffffcc";
      context.lineWidth = unit;
      const arm = 2.5 * unit;
      for (let s = 0; s < block.keys; s++) {
        const [y, x] = block.origin(q, s);
        context.beginPath();
        context.moveTo(x * sx - arm, y * sy);
        context.lineTo(x * sx + arm, y * sy);
        context.moveTo(x * sx, y * sy - arm);
        context.lineTo(x * sx, y * sy + arm);
        context.stroke();
      }
    }

    // The words about what lies under the pointer, at (y, x) in pixels of the model's input.
    describe(y, x) {
      const reading = this.reading_;
      const block = this.block;
      if (reading.all[0].row !== undefined) {
        const cell = state.mode !== "readers" && block.keyCell ? block.keyCell : [block.cell, block.cell];
        const [row, column] = [Math.floor(y / cell[0]), Math.floor(x / cell[1])];
        const key = reading.all.find((one) => one.row === row && one.column === column);
        if (!key) return "not among the keys of this query";
        return state.mode === "readers" ? `this query gives it ${percent(key.w)}` : `weight ${percent(key.w)}`;
      }
      let best = null;
      for (const key of reading.keys) {
        const distance = Math.hypot(key.y - y, key.x - x);
        if (!best || distance < best.distance) best = { distance, key };
      }
      if (!best || best.distance > 0.035 * this.picture.size[0]) return "";
      const moved = offsetWords(best.key);
      const group = block.groups > 1 ? `, group ${best.key.group + 1}` : "";
      return `weight ${percent(best.key.w)}, ${moved === "none" ? "no offset" : `offset ${moved} px`}${group}`;
    }
  }

  // --- Small pieces --------------------------------------------------------------------------------

  const make = (name, properties) => Object.assign(document.createElement(name), properties);

  const load = (source) => new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = reject;
    image.src = source;
  });

  function arrow(context, x0, y0, x1, y1, tint, unit) {
    const length = Math.hypot(x1 - x0, y1 - y0);
    if (length < unit) return;
    context.strokeStyle = context.fillStyle = tint;
    context.lineWidth = 1.3 * unit;
    context.beginPath();
    context.moveTo(x0, y0);
    context.lineTo(x1, y1);
    context.stroke();
    context.beginPath();
    context.arc(x0, y0, 1.4 * unit, 0, 2 * Math.PI);
    context.fill();
  }

  function star(context, x, y, radius) {
    context.beginPath();
    for (let i = 0; i < 10; i++) {
      const angle = (Math.PI * i) / 5 - Math.PI / 2;
      const r = i % 2 ? 0.42 * radius : radius;
      context.lineTo(x + r * Math.cos(angle), y + r * Math.sin(angle));
    }
    context.closePath();
    context.fillStyle = QUERY;
    context.fill();
    context.strokeStyle = "#000";
    context.lineWidth = radius / 12;
    context.stroke();
  }

  function mark(context, x, y, radius, tint) {
    context.strokeStyle = "#000";
    context.lineWidth = radius / 2;
    for (const [stroke, width] of [["#000", radius / 1.6], [tint, radius / 3.5]]) {
      context.strokeStyle = stroke;
      context.lineWidth = width;
      context.beginPath();
      context.arc(x, y, radius, 0, 2 * Math.PI);
      context.stroke();
    }
  }

  // --- Controls ------------------------------------------------------------------------------------

  let waiting = false;
  function redraw() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      const nouns = { reads: "keys that hold", readers: "queries that give", overall: "keys that hold" };
      document.getElementById("share-text").textContent = `${nouns[state.mode]} ${state.share} %`;
      document.getElementById("stage-label").hidden = state.mode !== "overall";
      for (const view of views) view.draw();
    });
  }

  // Of several models, each that has the block shows it.
  function select(name) {
    for (const view of views) if (view.blocks.some((block) => block.name === name)) view.selected = name;
    redraw();
  }

  function setMode(mode) {
    state.mode = mode;
    document.querySelector(`input[name="mode"][value="${mode}"]`).checked = true;
    redraw();
  }

  function setLayer(name, on) {
    layers[name] = on;
    document.getElementById(name).checked = on;
    redraw();
  }

  function setShare(value) {
    state.share = Math.min(100, Math.max(1, value));
    document.getElementById("share").value = state.share;
    redraw();
  }

  for (const input of document.querySelectorAll('input[name="mode"]')) input.addEventListener("change", () => setMode(input.value));
  for (const name of Object.keys(layers)) {
    document.getElementById(name).addEventListener("change", (event) => setLayer(name, event.target.checked));
  }
  document.getElementById("share").addEventListener("input", (event) => setShare(Number(event.target.value)));

  const tip = document.getElementById("tip");
  function connect(view) {
    const { canvas } = view;
    const point = (event) => {
      const box = canvas.getBoundingClientRect();
      const share = (value, length) => Math.min(0.99999, Math.max(0, value / length));
      return [share(event.clientY - box.top, box.height), share(event.clientX - box.left, box.width)];
    };
    const ask = (event) => {
      [state.y, state.x] = point(event);
      redraw();
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      ask(event);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (event.buttons) ask(event);
      const [y, x] = point(event);
      tip.textContent = view.describe(y * view.picture.size[0], x * view.picture.size[1]);
      tip.hidden = !tip.textContent;
      tip.style.left = `${Math.min(event.clientX + 14, window.innerWidth - 220)}px`;
      tip.style.top = `${event.clientY + 16}px`;
    });
    canvas.addEventListener("pointerleave", () => (tip.hidden = true));
    const colours = view.find(".colours").getContext("2d");
    for (let i = 0; i < 240; i++) {
      colours.fillStyle = colour(i / 239);
      colours.fillRect(i, 0, 1, 20);
    }
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches('input[type="range"], input[type="radio"]')) return;
    const arrows = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const key = event.key.toLowerCase();
    if (event.key in arrows) {
      const [dy, dx] = arrows[event.key];
      if (event.shiftKey) {
        const { block, picture } = views[0];
        const move = (share, delta, length) => Math.min(0.99999, Math.max(0, share + (delta * block.cell) / length));
        state.y = move(state.y, dy, picture.size[0]);
        state.x = move(state.x, dx, picture.size[1]);
        redraw();
      } else {
        select(views[0].neighbour(dy + dx, dy !== 0));
      }
    } else if ("123".includes(key)) setMode(["reads", "readers", "overall"][Number(key) - 1]);
    else if (key === "o") setLayer("offsets", !layers.offsets);
    else if (key === "g") setLayer("grid", !layers.grid);
    else if (key === "c") setLayer("gradient", !layers.gradient);
    else if (key === "m") setLayer("seen", !layers.seen);
    else if (key === "[") setShare(state.share - 5);
    else if (key === "]") setShare(state.share + 5);
    else return;
    event.preventDefault();
  });

  async function open(index) {
    state.picture = index;
    await Promise.all(views.map((view) => view.open(index)));
    select(views[0].selected);
    for (const [k, button] of [...document.getElementById("pictures").children].entries()) button.setAttribute("aria-pressed", String(k === index));
    redraw();
  }

  const { pictures } = page.models[0];
  if (pictures.length > 1) {
    const buttons = pictures.map((picture, index) => {
      const button = make("button", { type: "button", title: picture.name });
      button.append(make("img", { src: picture.shown, alt: picture.name }));
      button.addEventListener("click", () => open(index));
      return button;
    });
    document.getElementById("pictures").append(...buttons);
  }
  page.models.forEach((model, index) => {
    const view = new View(document.querySelector(`[data-model="${index}"]`), model);
    views.push(view);
    connect(view);
  });
  open(0).then(() => document.body.setAttribute("data-ready", ""));
})();
