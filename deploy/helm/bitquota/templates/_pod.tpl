{{- define "bitquota.labels" -}}
app.kubernetes.io/name: bitquota
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- /* What the chart itself says to a pod may not come a second time from settings. */}}
{{- define "bitquota.environment" -}}
{{- range tuple "DATA_DIR" "HOST" "PORT" "TRUSTED_PROXIES" "DATABASE_URL" "DATABASE_PASSWORD_FILE" "SLOTS" "SANDBOX" }}
{{- if hasKey $.Values.settings (printf "BITQUOTA_%s" .) }}
{{- fail (printf "settings may hold only variables that the chart does not set itself; got BITQUOTA_%s: see database, trustedProxies and workers in values.yaml" .) }}
{{- end }}
{{- end }}
- { name: BITQUOTA_DATA_DIR, value: /data }
- { name: BITQUOTA_HOST, value: "0.0.0.0" }
- { name: BITQUOTA_PORT, value: "8000" }
- { name: BITQUOTA_TRUSTED_PROXIES, value: {{ .Values.trustedProxies | quote }} }
{{- if .Values.database.url }}
- { name: BITQUOTA_DATABASE_URL, value: {{ .Values.database.url | quote }} }
- { name: BITQUOTA_DATABASE_PASSWORD_FILE, value: /run/database/password }
{{- end }}
{{- range $name, $value := .Values.settings }}
- { name: {{ $name }}, value: {{ $value | quote }} }
{{- end }}
{{- end }}

{{- define "bitquota.mounts" -}}
- { name: data, mountPath: /data }
- { name: tmp, mountPath: /tmp }
{{- if .Values.database.url }}
- { name: database, mountPath: /run/database, readOnly: true }
{{- end }}
{{- end }}

{{- define "bitquota.volumes" -}}
- name: data
  persistentVolumeClaim: { claimName: {{ .Release.Name }}-data }
- name: tmp
  emptyDir: {}
{{- if .Values.database.url }}
- name: database
  secret: { secretName: {{ required "database.url needs database.secret: the name of a Secret with the key 'password'" .Values.database.secret | quote }}, defaultMode: 288 }
{{- end }}
{{- end }}

{{- define "bitquota.probes" -}}
startupProbe:
  httpGet: { path: /healthz, port: http }
  failureThreshold: 30
  periodSeconds: 2
livenessProbe:
  httpGet: { path: /healthz, port: http }
  periodSeconds: 10
readinessProbe:
  httpGet: { path: /readyz, port: http }
  periodSeconds: 10
{{- end }}
