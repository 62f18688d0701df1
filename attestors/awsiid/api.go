package awsiid

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/hallmark-id/hallmark/attestors/cloud"
)

// API asks AWS's APIs of the JSON protocol, with the server's own credentials:
// those of the environment, or of its EC2 instance's role.
type API struct {
	endpoint    string // "": AWS's own
	service     *cloud.Service
	credentials *credentials
	now         func() time.Time
}

// NewAPI makes it. An empty endpoint is AWS's own, by service and region; an
// empty address of the metadata service is that which instances have.
func NewAPI(endpoint, metadataAddress string, now func() time.Time) (*API, error) {
	if endpoint != "" {
		var err error
		if endpoint, err = cloud.CheckEndpoint(endpoint); err != nil {
			return nil, fmt.Errorf("endpoint: %w", err)
		}
	}
	metadata, err := cloud.Metadata(cmp.Or(metadataAddress, cloud.MetadataAddress))
	if err != nil {
		return nil, fmt.Errorf("metadata_address: %w", err)
	}
	return &API{endpoint, cloud.API(), &credentials{imds: imds{metadata}, now: now}, now}, nil
}

// APIError is an error that AWS answered with.
type APIError struct{ Code, Message string }

func (e *APIError) Error() string { return e.Code + ": " + e.Message }

// AskJSON sends a request, signed with SigV4, and returns the answer of at most
// so many bytes. The error is an [*APIError] if AWS answered with one.
func (a *API) AskJSON(ctx context.Context, region, service, target string, body []byte, most int64) ([]byte, error) {
	a.credentials.mu.Lock()
	keys, err := a.credentials.mine(ctx)
	a.credentials.mu.Unlock()
	if err != nil {
		return nil, err
	}
	endpoint, signed := endpointOf(service, region)
	sum := sha256.Sum256(body)
	answer, err := a.service.Do(ctx, cloud.Question{
		Method: http.MethodPost, URL: cmp.Or(a.endpoint, endpoint) + "/", Body: string(body), Most: most,
		Header: map[string]string{"Content-Type": "application/x-amz-json-1.1", "X-Amz-Target": target},
		Sign: func(r *http.Request) error {
			return v4.NewSigner().SignHTTP(r.Context(), keys.aws(), r, hex.EncodeToString(sum[:]), service, signed, a.now())
		},
	})
	var status *cloud.StatusError
	if errors.As(err, &status) {
		var failed struct {
			Type    string `json:"__type"`
			Message string `json:"message"`
		}
		if json.Unmarshal(status.Body, &failed) == nil && failed.Type != "" {
			// Some have the name of a namespace before it.
			return nil, fmt.Errorf("%s answered: %w", service, &APIError{failed.Type[strings.LastIndexByte(failed.Type, '#')+1:], failed.Message})
		}
	}
	if err != nil {
		return nil, err
	}
	return answer.Body, nil
}
