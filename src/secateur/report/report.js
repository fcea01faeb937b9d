(() => {
  const { root, $, save, line, sorts } = page;

  // The record: layers come as columns and rows to keep the page small.
  const unpack = (run) => {
    const packed = run.layers;
    if (packed && packed.columns)
      run.layers = packed.rows.map((row) => Object.fromEntries(packed.columns.map((key, i) => [key, row[i]])));
    return run;
  };
  const record = JSON.parse($("record").textContent);
  unpack(record.run);
  record.compare.forEach(unpack);

  // The layer table: sort and filter.
  const table = $("layers");
  if (table) {
    const body = table.tBodies[0];
    const layers = record.run.layers.filter((x) => x && typeof x === "object" && !Array.isArray(x));
    const rows = [...body.rows].map((row, i) => {
      const x = layers[i] || {};
      const sparsity = typeof x.sparsity === "number" ? x.sparsity : parseFloat(row.cells[5].textContent);
      return { row, i, text: row.textContent.toLowerCase(), block: String(x.block),
        key: { ...x, name: i, shape: x.parameters, sparsity, notes: row.cells[8].textContent } };
    });
    sorts(table, rows, ["name"]);
    const filter = $("filter"), shown = $("shown");
    filter.oninput = () => {
      const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      let n = 0;
      for (const r of rows) {
        const fits = words.every((w) => (/^\d+$/.test(w) ? r.block === w || r.text.includes("." + w + ".") : r.text.includes(w)));
        r.row.hidden = !fits;
        n += fits;
      }
      shown.textContent = words.length ? n + " of " + rows.length + " layers" : rows.length + " layers";
    };
    const csv = () => {
      const keys = [...new Set(layers.flatMap(Object.keys))];
      return line(keys) + layers.map((x) => line(keys.map((k) => x[k]))).join("");
    };
    $("csv").onclick = () => save("layers.csv", "text/csv", csv());
    $("json").onclick = () => save("run.json", "application/json",
      JSON.stringify(record.compare.length ? record : record.run, null, 2) + "\n");
  }

  root.dataset.ready = "1";
})();
