// Tables sort by a click on a column's head, or Enter; once more turns the order round. Numbers by value, dashes last.
document.querySelectorAll("table:not(.parameters):not(.runs)").forEach(table => {
  const body = table.tBodies[0], heads = table.tHead ? [...table.tHead.rows[table.tHead.rows.length - 1].cells] : [];
  if (!body || body.rows.length < 3 || table.querySelector("[rowspan]:not([rowspan='1'])")) return;
  const value = cell => {
    const text = cell ? cell.textContent.trim() : "", found = text.match(/^[-+−]?[\d,]*\.?\d+/);
    if (text === "" || text === "–") return [2, 0];
    return found ? [0, parseFloat(found[0].replace("−", "-").replace(/,/g, ""))] : [1, text.toLowerCase()];
  };
  heads.forEach((head, column) => {
    const sort = () => {
      const turned = head.getAttribute("aria-sort") === "descending" ? "ascending" : "descending";
      const sign = turned === "ascending" ? 1 : -1;
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", turned);
      [...body.rows].map((row, place) => ({row, place, key: value(row.cells[column])})).sort((a, b) =>
        a.key[0] - b.key[0] || sign * (a.key[1] < b.key[1] ? -1 : a.key[1] > b.key[1] ? 1 : 0) || a.place - b.place
      ).forEach(each => body.appendChild(each.row));
    };
    head.tabIndex = 0;
    head.classList.add("sorts");
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
  });
});
