"""Web page of the server, at its root: search and conversation in a browser.

The files are sent as they are; there is no build step. The page uses only the endpoints that other
clients use too. It loads nothing from other servers, and its headers forbid it to.

    index.html      the whole structure of the page
    style.css       colours (light and dark), layout, phone width
    app.js          start: asks the server what it offers, and shows these parts
    api.js          requests, errors in words, API key, stream of an answer
    dom.js          makes elements; texts become text nodes and never HTML
    images.js       images of the index, and image files of the user
    filters.js      filters on metadata, as conditions of `where`
    search.js       search, results, pages
    details.js      one document: image, text, metadata
    chat.js         conversation
    transcript.js   elements of one answer: text, retrieved images, sources
"""
