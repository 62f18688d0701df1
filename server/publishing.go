package server

import (
	"log/slog"
	"strconv"
	"strings"

	"github.com/hallmark-id/hallmark/server/metrics"
	"github.com/hallmark-id/hallmark/server/publish"
	"github.com/hallmark-id/hallmark/server/registry"
)

func (s *settings) checkPublish(wrong func(path, format string, args ...any)) {
	publish.CheckAll(s.Publish, func(path string, err error) {
		wrong(strings.TrimSuffix("publish."+path, "."), "publish: %v", err)
	})
	for i, t := range s.Publish {
		for j, issuer := range t.Issuers {
			if issuer.URL != "" && !s.issues(issuer.URL) {
				wrong("publish."+strconv.Itoa(i)+".issuers."+strconv.Itoa(j), "publish: no token has %.200q as claim iss, so that no relying party would come; set jwt.issuer to it", issuer.URL)
			}
		}
	}
}

// unpublished says which targets fail. The server is ready all the same: those who
// read them have what was published before.
func unpublished(documents *publish.Publisher) (warnings []string) {
	for _, t := range documents.Targets() {
		if t.State == publish.Failing {
			warnings = append(warnings, "the target "+t.Name+" of publish fails: "+t.Error)
		}
	}
	return warnings
}

// newDocuments makes what publishes the bundle and the documents of issuers.
func (s *settings) newDocuments(name string, reg *registry.Registry, log *slog.Logger, counted *metrics.Metrics) *publish.Publisher {
	return publish.New(publish.Options{
		Targets: s.Publish, Server: name, Bundle: publish.FromRegistry(reg), MaxAge: s.issuerMaxAge(), Log: log, Metrics: counted,
	})
}
