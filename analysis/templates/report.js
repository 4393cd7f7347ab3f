"use strict";
// The report's curves: where scripts run, uPlot takes the place of the still pictures.
(() => {
  const { charts } = JSON.parse(document.getElementById("data-charts").textContent);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const digits = (value) => (value === null || value === undefined ? "—" : Number(value.toPrecision(5)).toLocaleString("en", { maximumSignificantDigits: 5 }));
  const plots = [];

  function options(chart, width) {
    const text = css("--quiet");
    const axis = { stroke: text, font: "12px system-ui, sans-serif", grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line") } };
    const series = [{ label: chart.xLabel, value: (_, v) => digits(v) }];
    const bands = [];
    for (const band of chart.bands) {
      const hidden = { label: band.label, stroke: "transparent", width: 0, points: { show: false }, value: (_, v) => digits(v), spanGaps: true };
      bands.push({ series: [series.length, series.length + 1], fill: `${band.colour}40` });
      series.push({ ...hidden, label: `${band.label}, high` }, { ...hidden, label: `${band.label}, low` });
    }
    for (const line of chart.lines) {
      const few = line.y.filter((v) => v !== null).length < 2;
      series.push({
        label: line.label,
        stroke: line.faint ? `${line.colour}66` : line.colour,
        width: line.faint ? 1 : 2,
        points: { show: few },
        spanGaps: true,
        value: (_, v) => digits(v),
      });
    }
    return {
      width,
      height: Math.round(Math.max(210, 0.46 * width)),
      series,
      bands,
      axes: [axis, { ...axis, size: 62, values: (_, ticks) => ticks.map((v) => (v === null ? "" : digits(v))) }],
      scales: { x: { time: false }, y: { distr: chart.log ? 3 : 1 } },
      cursor: { focus: { prox: 30 }, drag: { x: true, y: false } },
      focus: { alpha: 0.35 },
      legend: { show: chart.bands.length + chart.lines.filter((line) => !line.faint).length <= 14 },
    };
  }

  function table(chart) {
    const positive = (values) => (chart.log ? values.map((v) => (v > 0 ? v : null)) : values);
    const tables = [];
    for (const band of chart.bands) tables.push([band.x, positive(band.high)], [band.x, positive(band.low)]);
    for (const line of chart.lines) tables.push([line.x, positive(line.y)]);
    return uPlot.join(tables.map(unique), tables.map(() => [2, 1])); // gaps of other lines are no gaps
  }

  // One value at a place: the last, as a resumed run writes it again.
  function unique([x, y]) {
    const last = new Map(x.map((value, i) => [value, y[i]]));
    const places = [...last.keys()].sort((a, b) => a - b);
    return [places, places.map((value) => last.get(value))];
  }

  function draw() {
    for (const plot of plots.splice(0)) plot.destroy();
    for (const figure of document.querySelectorAll("[data-chart]")) {
      const chart = charts[Number(figure.dataset.chart)];
      let live = figure.querySelector("div.live");
      if (!live) {
        live = document.createElement("div");
        live.className = "live";
        figure.append(live);
        figure.querySelector(".still").style.display = "none";
      }
      const plot = new uPlot(options(chart, figure.clientWidth), table(chart), live);
      // The ends of bands, and the runs behind a mean, are seen without names.
      const quiet = [false, ...chart.bands.flatMap(() => [true, true]), ...chart.lines.map((line) => line.faint && chart.bands.length > 0)];
      plot.root.querySelectorAll(".u-series").forEach((row, index) => (row.hidden = quiet[index]));
      plots.push(plot);
    }
  }

  const hint = document.querySelector("p.live");
  if (hint) hint.hidden = false;
  draw();
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return;
    width = window.innerWidth;
    requestAnimationFrame(draw);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  document.body.setAttribute("data-ready", "");
})();
