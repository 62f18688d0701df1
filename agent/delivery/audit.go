package delivery

import (
	"context"
	"log/slog"
	"strings"

	"github.com/hallmark-id/hallmark/agent/held"
)

// Audit records each SVID that somebody was given on behalf of a workload: who
// it was, what they asked for, and what they got.
type Audit struct {
	Log       *slog.Logger
	By        slog.Attr // who asked
	Reference slog.Attr // how they named the workload
}

// X509 returns what is to be told of each update that a stream sends, before it
// does. It records an X509-SVID once for each stream.
func (a Audit) X509() func(*held.Update) {
	var recorded map[*held.X509SVID]bool
	return func(u *held.Update) {
		sent := make(map[*held.X509SVID]bool, len(u.Identities))
		for _, i := range u.Identities {
			if i.SVID == nil {
				continue
			}
			sent[i.SVID] = true
			if !recorded[i.SVID] {
				a.record("X509-SVID issued on behalf of a workload", slog.String("spiffe_id", i.Entry.SPIFFEID.String()),
					slog.String("entry", i.Entry.ID), slog.Time("expires_at", i.SVID.ExpiresAt))
			}
		}
		recorded = sent
	}
}

// JWT records JWT-SVIDs.
func (a Audit) JWT(svids []JWT, audience []string) {
	for _, j := range svids {
		a.record("JWT-SVID issued on behalf of a workload", slog.String("spiffe_id", j.Entry.SPIFFEID.String()),
			slog.String("entry", j.Entry.ID), slog.String("audience", strings.Join(audience, " ")), slog.Time("expires_at", j.ExpiresAt))
	}
}

func (a Audit) record(what string, attrs ...slog.Attr) {
	a.Log.LogAttrs(context.Background(), slog.LevelInfo, what, append([]slog.Attr{a.By, a.Reference}, attrs...)...)
}
