"""The status page: `page.html` with `page.css` and `page.js`, put together and served by `novafs.statusserver`."""
