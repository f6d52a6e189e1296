"use strict";
// Draws the page from the data beside it. Texts of runs get in as text alone, never as HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const page = document.getElementById("page");
  const COLOURS = {
    light: ["#0b63a5", "#c8531b", "#16794a", "#8a3ea8", "#a07800", "#c2306d", "#3c8c9a", "#5c6670"],
    dark: ["#7cc0f5", "#ff9f66", "#6cd49b", "#cf9be6", "#e6c656", "#f58db8", "#7fd4e2", "#9ba6b0"],
  };
  const HEIGHT = 190;
  const asked = new URLSearchParams(location.hash.slice(1));
  const state = {
    language: data.texts[asked.get("lang")] ? asked.get("lang") : data.language,
    theme: asked.get("theme") || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"),
    run: data.runs.length === 1 ? 0 : null,
  };
  let charts = [];

  // ---------------------------------------------------------------- small helpers

  const say = (name, values = {}) => {
    const text = data.texts[state.language][name] ?? name;
    return text.replace(/\{(\w+)\}/g, (whole, key) => (key in values ? String(values[key]) : whole));
  };
  const both = (texts) => texts[state.language];

  function make(tag, kind, ...children) {
    const made = document.createElement(tag);
    if (kind) made.className = kind;
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  }

  function figure(value) {
    if (value === null || value === undefined) return say("unset");
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
    return String(Number(value.toPrecision(4)));
  }

  const colour = (number) => COLOURS[state.theme][number % COLOURS.light.length];
  const variable = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const faded = (hex, share) => hex + Math.round(share * 255).toString(16).padStart(2, "0");
  const chosen = () => (state.run === null ? data.runs : [data.runs[state.run]]);

  // A name of several words, which may go on in the next line behind each.
  function breakable(name) {
    const parts = name.split(/(?<=[/_.])/);
    return parts.flatMap((part, place) => (place ? [document.createElement("wbr"), part] : [part]));
  }

  function section(name, ...children) {
    const made = make("section", null, make("h2", null, say(name)), ...children);
    made.id = name;
    return made;
  }

  function table(head, rows, kind) {
    const made = make("table", kind);
    if (head) made.append(make("thead", null, make("tr", null, ...head.map((cell) => make("th", null, cell)))));
    const line = (cells) => make("tr", null, ...cells.map((cell, place) => {
      const found = cell instanceof HTMLTableCellElement ? cell
        : cell instanceof Node ? make("td", null, cell) : make(place ? "td" : "th", null, ...breakable(cell));
      // On a phone, where there is no head, a cell says itself whose it is.
      if (head && place) found.dataset.of = head[place];
      return found;
    }));
    made.append(make("tbody", null, ...rows.map(line)));
    return make("div", "card wide", made);
  }

  function button(text, act, pressed) {
    const made = make("button", null, text);
    made.type = "button";
    if (pressed !== undefined) made.setAttribute("aria-pressed", String(pressed));
    made.addEventListener("click", act);
    return made;
  }

  // ---------------------------------------------------------------- head: verdicts

  function head() {
    const tools = make("div", "tools",
      button(say("other_language"), () => change({ language: state.language === "en" ? "zh" : "en" })),
      button(say("theme"), () => change({ theme: state.theme === "dark" ? "light" : "dark" })));
    const title = data.runs.length === 1 ? `${say("title")}: ${data.runs[0].name}` : say("title");
    return make("header", null, make("h1", null, title), make("span", "soft", say("made", data)), tools);
  }

  function verdicts() {
    return make("div", "verdicts", ...data.runs.map((run) => make("div", `card verdict ${run.state}`,
      make("div", null, make("span", `badge ${run.state}`, say(`state_${run.state}`)), make("h3", null, run.name)),
      make("p", null, both(run.verdict)))));
  }

  function pick() {
    if (data.runs.length === 1) return null;
    const names = [[null, say("all_runs")], ...data.runs.map((run, number) => [number, run.name])];
    return make("div", "pick", make("span", "soft", say("runs")),
      ...names.map(([number, name]) => button(name, () => change({ run: number }), state.run === number)));
  }

  // ---------------------------------------------------------------- tables: figures, settings

  const columns = () => [say("runs"), ...data.runs.map((run) => run.name)];

  function figures() {
    const names = [...new Set(data.runs.flatMap((run) => Object.keys(run.figures)))];
    if (!names.length) return null;
    const cell = (values) => (values ? values.map(figure).join(" → ") : say("unset"));
    return section("figures", table(data.runs.length > 1 ? columns() : null,
      names.map((name) => [name, ...data.runs.map((run) => cell(run.figures[name]))])),
      make("p", "soft", say("figures_note")));
  }

  function what() {
    const record = (run, name) => run.record?.[name] ?? say("not_recorded");
    const versions = (run) => (Object.keys(run.record?.versions ?? {}).length
      ? Object.entries(run.record.versions).map((pair) => pair.join(" ")).join(", ") : say("not_recorded"));
    const git = (run) => (run.record?.git ? run.record.git.slice(0, 12) + (run.record.dirty ? ` (${say("dirty")})` : "")
      : say("not_recorded"));
    const rows = {
      stage: (run) => run.stages.map((stage) => stage[0]).join(", ") || say("unset"),
      steps: (run) => say("steps_cell", { count: run.steps, first: run.first, last: run.last }),
      preset: (run) => record(run, "preset"), started: (run) => record(run, "started"),
      starts: (run) => String(record(run, "starts")), device: (run) => record(run, "device"), git, versions,
    };
    const facts = Object.entries(rows).map(([name, of]) => [say(name), ...data.runs.map((run) => String(of(run)))]);
    return section("what", table(data.runs.length > 1 ? columns() : null, facts));
  }

  function settings() {
    if (!data.settings.length) return section("settings", make("p", "soft", say("no_settings")));
    const cell = (content) => {
      if (content === null) return say("unset");
      if (!("preset" in content)) return content.value;
      return make("td", null, make("span", "changed", ...breakable(content.value)), make("span", "soft", say("preset_value", { value: content.preset })));
    };
    return section("settings", table(data.runs.length > 1 ? columns() : null,
      data.settings.map((row) => [row.key, ...row.cells.map(cell)])), make("p", "soft", say("settings_note")));
  }

  // ---------------------------------------------------------------- alarms

  function stretch(kind, first, last, run, text) {
    const made = make("i", kind);
    const whole = Math.max(1, run.last - run.first + 1);
    made.style.left = `${(100 * (first - run.first)) / whole}%`;
    made.style.width = `${Math.min(100, (100 * (last - first + 1)) / whole)}%`;
    if (text) made.append(make("span", null, text));
    return made;
  }

  function alarmsOf(run) {
    const stages = run.stages.map(([name, first, last], number) => {
      const made = stretch("stage", first, last, run, name);
      made.style.background = COLOURS.light[number % 8];
      return made;
    });
    const made = make("div", "card", data.runs.length > 1 ? make("h3", null, run.name) : null,
      make("div", "line", make("span", "name soft", `${say("step")} ${run.first}–${run.last}`), make("div", "track", ...stages)));
    const byRule = [...new Set(run.alarms.map((alarm) => alarm.id))].map((id) => run.alarms.filter((alarm) => alarm.id === id));
    for (const alarms of byRule) {
      const kind = (alarm) => `${alarm.note ? "note" : ""} ${alarm.until === null ? "" : "over"}`;
      made.append(make("div", "line", make("span", "name", alarms[0].id), make("div", "track",
        ...alarms.map((alarm) => stretch(kind(alarm), alarm.since, alarm.until ?? run.last, run)))));
    }
    // Of a rule that has fired several times, the time that matters most: the present one, else the first.
    for (const alarms of byRule) made.append(explained(alarms[0], alarms.length));
    if (!run.alarms.some((alarm) => !alarm.note)) made.append(make("p", "soft", say("no_alarms")));
    return made;
  }

  function explained(alarm, times) {
    const kind = alarm.note ? "note" : alarm.until === null ? "alarm" : "over";
    const name = alarm.note ? "note" : alarm.until === null ? "state_alarm" : "over";
    const until = alarm.until === null ? say("firing") : say("until_step", { step: alarm.until });
    const values = { ...alarm, label: both(alarm.label), value: figure(alarm.value), range: both(alarm.range), until };
    const follows = alarm.follows ? ` (${say("follows", { id: alarm.follows })})` : "";
    const made = make("details", null,
      make("summary", null, both(alarm.says), make("span", `badge ${kind}`, say(name) + (times > 1 ? ` × ${times}` : ""))),
      make("p", "soft", `${alarm.id}: ${say("alarm_facts", values)}${follows}`),
      make("ol", null, ...both(alarm.causes).map((cause) => make("li", null, cause))));
    made.open = kind === "alarm";
    return made;
  }

  // ---------------------------------------------------------------- curves

  function axes(log) {
    const look = { stroke: variable("--soft"), grid: { stroke: variable("--grid"), width: 1 }, ticks: { stroke: variable("--grid") },
      font: "11px system-ui, sans-serif" };
    const numbers = (plot, values) => values.map((value) => (value === null ? "" : figure(value)));
    return [{ ...look, size: 30 }, { ...look, size: 58, values: numbers, ...(log ? { space: 22 } : {}) }];
  }

  function draw(place, series, rows, options = {}) {
    const plot = new uPlot({
      width: Math.max(200, place.clientWidth), height: HEIGHT,
      series: [{ label: say("step"), value: (plot, value) => (value === null ? say("unset") : String(value)) }, ...series],
      bands: options.bands, axes: axes(options.log),
      scales: { x: { time: false, range: (plot, low, high) => (low === high ? [low - 1, high + 1] : [low, high]) },
        y: options.log ? { distr: 3 } : { range: (plot, low, high) => (low === high || low === null
          ? [low ? low - Math.abs(low) : -0.05, low ? low + Math.abs(low) : 1] : uPlot.rangeNum(low, high, 0.08, false)) } },
      cursor: { sync: { key: "steps" }, points: { size: 5 }, drag: { x: true, y: false } },
      hooks: { drawClear: options.behind ? [options.behind] : [] },
    }, rows, place);
    charts.push([plot, place]);
  }

  function lineSeries(label, number, points) {
    return { label, stroke: colour(number), width: 1.6, spanGaps: true,
      points: { show: points < 30, size: 4, fill: colour(number) },
      value: (plot, value) => (value === null || value === undefined ? say("unset") : figure(value)) };
  }

  // The healthy pieces to draw: those of one run, or of several where they agree; null where they do not.
  function agreed(runs, metric) {
    const per = runs.filter((run) => run.series[metric]).map((run) => run.bands[metric] ?? []);
    if (per.length < 2) return per[0] ?? [];
    const limits = new Set(per.flatMap((pieces) => (pieces.length ? pieces.map((piece) => `${piece[2]},${piece[3]}`) : ["none"])));
    if (limits.size > 1) return null;
    return per[0].length ? [[-Infinity, Infinity, per[0][0][2], per[0][0][3]]] : [];
  }

  function behind(pieces, alarms) {
    return (plot) => {
      const { left, top, width, height } = plot.bbox;
      const x = (step) => Math.min(left + width, Math.max(left, Number.isFinite(step) ? plot.valToPos(step, "x", true) : step < 0 ? left : left + width));
      const y = (value, open) => (value === null ? open : Math.min(top + height, Math.max(top, plot.valToPos(value, "y", true))));
      const fill = (first, last, low, high, look) => {
        const [from, to, upper, lower] = [x(first), x(last), y(high, top), y(low, top + height)];
        if (lower <= upper) return;
        plot.ctx.fillStyle = variable(look);
        plot.ctx.fillRect(from, upper, Math.max(2, to - from), lower - upper);
      };
      for (const [first, last, low, high] of pieces) fill(first, last, low, high, "--band");
      for (const [first, last] of alarms) fill(first, last, null, null, "--alarm");
    };
  }

  // Of one run all metrics of a panel; of several, beside each other, the one that most of them have.
  function curve(panel, runs) {
    const having = (name) => runs.filter((run) => run.series[name]).length;
    const metric = panel.metrics.reduce((best, name) => (having(name) > having(best) ? name : best));
    if (!having(metric)) return null;
    const series = [];
    const rows = [];
    runs.forEach((run) => (runs.length > 1 ? [metric] : panel.metrics).forEach((name, place) => {
      if (!run.series[name]) return;
      const [steps, values] = run.series[name];
      const number = runs.length > 1 ? data.runs.indexOf(run) : place;
      series.push(lineSeries(runs.length > 1 ? run.name : name, number, steps.length));
      rows.push([steps, panel.log ? values.map((value) => (value > 0 ? value : null)) : values]);
    }));
    const pieces = agreed(runs, metric);
    const alarms = runs.flatMap((run) => run.alarms.filter((alarm) => !alarm.note && alarm.metrics.some((name) => (runs.length > 1 ? name === metric : panel.metrics.includes(name))))
      .map((alarm) => [alarm.since, alarm.until ?? run.last]));
    const place = make("div", "chart");
    const made = make("div", "card", make("h3", null, say(panel.id)),
      runs.length > 1 ? make("p", "soft metric", metric) : null, place, pieces === null ? make("p", "soft", say("bands_differ")) : null);
    return { made, start: () => draw(place, series, uPlot.join(rows.map(([steps, values]) => [steps, values])),
      { log: panel.log && rows.some((row) => row[1].some((value) => value > 0)), behind: behind(pieces ?? [], alarms) }) };
  }

  function scores(run) {
    const known = Object.entries(run.scores);
    if (!known.length) return null;
    const series = [];
    const bands = [];
    const rows = [];
    known.forEach(([who, { steps, columns, kind }], number) => {
      const middle = (columns.length - 1) / 2;
      const first = series.length + 1;
      columns.forEach((column, place) => {
        const line = lineSeries(place === middle ? say(`${who}_score`) : `${say(`${who}_score`)} ${kind === "quantiles" ? ["5 %", "25 %", "", "75 %", "95 %"][place] : ["−", "", "+"][place]}`, number, 99);
        series.push(place === middle ? line : { ...line, stroke: faded(colour(number), 0.35), width: 0.6, class: "quiet" });
        rows.push([steps, column]);
      });
      for (let place = 0; place < middle; place += 1) {
        bands.push({ series: [first + columns.length - 1 - place, first + place], fill: faded(colour(number), 0.16) });
      }
    });
    const place = make("div", "chart");
    const made = make("div", "card", make("h3", null, run.name), place, make("p", "soft", say(`scores_${known[0][1].kind}`)));
    return { made, start: () => draw(place, series, uPlot.join(rows), { bands }) };
  }

  function drawn(name, parts) {
    const there = parts.filter((part) => part !== null);
    if (!there.length) return null;
    const made = section(name, make("div", "grid", ...there.map((part) => part.made)));
    made.start = () => there.forEach((part) => part.start());
    return made;
  }

  // ---------------------------------------------------------------- time, answers

  function time() {
    const cards = chosen().filter((run) => run.time.length).map((run) => {
      const all = run.time.reduce((sum, row) => sum + row.seconds, 0) || 1;
      const rows = run.time.slice(0, 12).map((row) => {
        const bar = make("div", "bar");
        bar.style.width = `${(100 * row.seconds) / all}%`;
        return [row.part === "other" ? say("other") : row.part, bar, `${((100 * row.seconds) / all).toFixed(1)} %`,
          `${figure(row.seconds)} s`, row.mean === null ? say("unset") : `${figure(row.mean)} s`];
      });
      const made = table([say("part"), "", say("share"), say("total"), say("each")], rows, "times");
      if (data.runs.length > 1) made.prepend(make("h3", null, run.name));
      return made;
    });
    return cards.length ? section("time", ...cards, make("p", "soft", say("time_note"))) : null;
  }

  function answer(kind, title, text, facts) {
    return make("div", `answer ${kind}`, make("h3", null, title), make("div", "soft", facts.filter(Boolean).join(say("between_facts"))),
      make("div", "text", text || say("empty")));
  }

  const isNumber = (value) => typeof value === "number";

  function prompt(item, steps) {
    const given = steps.map((step) => [step, item.answers[step]]).filter((pair) => pair[1]);
    const students = given.map(([step, found]) => answer("", say("at_step", { step }), found.text, [
      isNumber(found.score) ? say(isNumber(found.teacher_score) ? "score_beside" : "score",
        { value: figure(found.score), teacher: figure(found.teacher_score) }) : "",
      isNumber(found.tokens) ? say("tokens", { count: found.tokens }) : "", found.finish]));
    return make("div", "card", make("h3", null, say("prompt")), make("div", "text prompt", item.prompt),
      make("div", "answers", answer("teacher", say("teacher"), item.teacher, []), ...students));
  }

  function answers() {
    const runs = chosen().filter((run) => run.answers);
    if (!runs.length) return null;
    return section("answers", ...runs.flatMap((run) => [
      data.runs.length > 1 ? make("h3", null, run.name) : null,
      make("p", "soft", say("first_of", { count: run.answers.prompts.length, steps: run.answers.steps.length })),
      ...run.answers.prompts.map((item) => prompt(item, run.answers.steps))]).filter(Boolean));
  }

  // ---------------------------------------------------------------- the whole

  function render() {
    charts.forEach(([plot]) => plot.destroy());
    charts = [];
    root.lang = state.language === "zh" ? "zh-CN" : "en";
    root.dataset.theme = state.theme;
    const curves = data.sections.map(({ section: name, panels }) => drawn(name, panels.map((panel) => curve(panel, chosen()))));
    const spread = drawn("scores", chosen().map(scores));
    const place = data.sections.findIndex((part) => part.section === "discriminator") + 1;
    curves.splice(place, 0, spread);
    const facts = make("div", data.runs.length > 1 ? null : "pair", ...[figures(), what()].filter(Boolean));
    const parts = [head(), verdicts(), facts, settings(), pick(), section("alarms", ...chosen().map(alarmsOf)),
      make("p", "soft", say("legend") + (chosen().length > 1 ? ` ${say("one_metric")}` : "")), ...curves, time(), answers(), footer()].filter(Boolean);
    page.replaceChildren(...parts);
    curves.filter(Boolean).forEach((part) => part.start());
  }

  function footer() {
    const thinned = data.runs.some((run) => run.thinned) ? make("p", "soft", say("thinned", data)) : null;
    return make("footer", null, thinned, make("p", "soft", "python -m verl.monitor --html · uPlot 1.6.32 (MIT)"));
  }

  function change(what) {
    Object.assign(state, what);
    const top = window.scrollY;
    render();
    window.scrollTo(0, top);
  }

  let width = 0;
  new ResizeObserver(() => {
    if (page.clientWidth === width) return;
    width = page.clientWidth;
    charts.forEach(([plot, place]) => plot.setSize({ width: Math.max(200, place.clientWidth), height: HEIGHT }));
  }).observe(page);
  let before = null;
  window.addEventListener("beforeprint", () => {
    before = state.theme;
    change({ theme: "light" });
    document.querySelectorAll("details").forEach((part) => { part.open = true; });
  });
  window.addEventListener("afterprint", () => before && change({ theme: before }));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (now) => change({ theme: now.matches ? "dark" : "light" }));
  render();
})();
