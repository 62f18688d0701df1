package imagesig

import (
	"strings"
	"testing"
)

// FuzzReadSignature reads what somebody may have put beside an image.
func FuzzReadSignature(f *testing.F) {
	digest := "sha256:" + strings.Repeat("ab", 32)
	payload := `{"critical":{"image":{"docker-manifest-digest":"` + digest + `"},"type":"cosign container image signature"}}`
	f.Add([]byte(payload), "AAAA", "", `{"SignedEntryTimestamp":"AAAA","Payload":{"body":"e30=","integratedTime":1,"logIndex":2,"logID":"ab"}}`)
	f.Add([]byte(payload), "AAAA", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "")
	f.Add([]byte(`{"mediaType":"application/vnd.dev.sigstore.bundle.v0.3+json","dsseEnvelope":{},"verificationMaterial":{"publicKey":{}}}`), "", "", "")
	t := &trust{}
	f.Fuzz(func(_ *testing.T, content []byte, signature, certificate, log string) {
		if s, err := readLayer(content, map[string]string{annotationSignature: signature, annotationCertificate: certificate, annotationBundle: log}, digest); err == nil {
			_, _ = t.verify(s)
		}
		if s, err := readBundle(content, digest); err == nil {
			_, _ = t.verify(s)
		}
	})
}
