(() => {
  const { root, $, save, line, sorts } = page;

  // Tables: sort by the number behind a cell, filter by words, save what is shown.
  document.querySelectorAll("table.grid").forEach((table) => {
    const heads = [...table.tHead.rows[0].cells];
    const worth = (cell) => (cell.dataset.v !== undefined ? +cell.dataset.v : cell.textContent === "–" ? null : cell.textContent);
    const rows = [...table.tBodies[0].rows].map((row, i) => ({
      row, i, text: row.textContent.toLowerCase(), key: [...row.cells].map(worth) }));
    sorts(table, rows, heads.flatMap((head, i) => (head.classList.contains("n") ? [] : [String(i)])));
    const filter = document.querySelector(`[data-filter="${table.id}"]`), shown = filter.parentNode.querySelector("output");
    const all = shown.textContent;
    filter.oninput = () => {
      const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      let n = 0;
      for (const r of rows) {
        const fits = words.every((w) => r.text.includes(w));
        r.row.hidden = !fits;
        n += fits;
      }
      shown.textContent = words.length ? n + " of " + all : all;
    };
    const button = document.querySelector(`[data-csv="${table.id}"]`);
    button.hidden = false;
    button.onclick = () => save(table.id + ".csv", "text/csv",
      line(heads.map((h) => h.textContent)) + rows.filter((r) => !r.row.hidden).map((r) => line(r.key)).join(""));
  });

  // A command can be taken along.
  document.querySelectorAll(".grid .wrap").forEach((cell) => {
    const text = cell.textContent;
    if (cell.tagName !== "TD" || !text || text === "–") return;
    cell.title = text;
    const button = Object.assign(document.createElement("button"), { type: "button", className: "mini" });
    button.setAttribute("aria-label", "Copy the command");
    button.dataset.label = "Copy";
    button.onclick = async () => {
      try {
        await navigator.clipboard.writeText(text);
        button.dataset.label = "Copied";
      } catch {
        getSelection().selectAllChildren(cell);
        button.dataset.label = "Selected";
      }
      setTimeout(() => { button.dataset.label = "Copy"; }, 1600);
    };
    cell.prepend(button);
  });

  // Panels: one of several is shown; printed are all.
  document.querySelectorAll(".panels").forEach((box, number) => {
    const list = [...box.children].filter((e) => e.classList.contains("panel"));
    if (list.length < 2) return;
    const bar = document.createElement("div");
    bar.className = "tabs";
    bar.setAttribute("role", "tablist");
    bar.setAttribute("aria-label", box.dataset.name);
    const tabs = list.map((panel, i) => {
      const tab = document.createElement("button");
      tab.type = "button";
      tab.textContent = panel.dataset.tab;
      tab.id = `tab-${number}-${i}`;
      panel.id = `panel-${number}-${i}`;
      tab.setAttribute("role", "tab");
      tab.setAttribute("aria-controls", panel.id);
      panel.setAttribute("role", "tabpanel");
      panel.setAttribute("aria-labelledby", tab.id);
      tab.onclick = () => choose(i);
      return tab;
    });
    const choose = (k, focus) => {
      tabs.forEach((tab, i) => {
        tab.setAttribute("aria-selected", String(i === k));
        tab.tabIndex = i === k ? 0 : -1;
        list[i].classList.toggle("away", i !== k);
      });
      if (focus) tabs[k].focus();
    };
    bar.onkeydown = (event) => {
      const at = tabs.indexOf(document.activeElement), last = tabs.length - 1;
      const to = { ArrowRight: at === last ? 0 : at + 1, ArrowLeft: at ? at - 1 : last, Home: 0, End: last }[event.key];
      if (at < 0 || to === undefined) return;
      event.preventDefault();
      choose(to, true);
    };
    bar.append(...tabs);
    box.prepend(bar);
    box.classList.add("tabbed");
    choose(list.length - 1);
  });

  // What is folded is printed open.
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    folded.forEach((e) => { e.open = true; });
  });
  addEventListener("afterprint", () => folded.forEach((e) => { e.open = false; }));

  const json = $("json");
  if (json) {
    json.hidden = false;
    json.onclick = () => {
      const { columns, rows, ...rest } = JSON.parse($("record").textContent);
      const whole = rows.map((row) => Object.fromEntries(columns.map((key, i) => [key, row[i]])));
      save("rows.json", "application/json", JSON.stringify({ ...rest, rows: whole }, null, 1) + "\n");
    };
  }
  root.dataset.ready = "1";
})();
